/** The one registry of policies: what `bundle.json` calls them. */

import { BundleError } from "../errors.js";
import { gridKind } from "./grid.js";
import { mixtureKind } from "./mixture.js";
import type { PolicyKind } from "./policy.js";

export type { Policy, PolicyKind } from "./policy.js";

const KINDS: Record<string, (described: any) => PolicyKind> = {
  gm: (described) => mixtureKind(described.eps, described.num_components, true),
  gmk: (described) => mixtureKind(described.eps, described.num_components, false),
  dx: (described) =>
    gridKind({
      numNodes: described.num_nodes,
      segmentSize: described.segment_size,
      shift: described.shift,
      mode: described.mode,
      eps: described.eps,
    }),
};

/** The kind of policy that a bundle describes. */
export function readPolicy(described: any): PolicyKind {
  const kind = described?.kind;
  if (!Object.hasOwn(KINDS, kind)) {
    throw new BundleError(`this release knows policies ${Object.keys(KINDS).join(", ")}; got ${kind}`);
  }
  return KINDS[kind](described);
}
