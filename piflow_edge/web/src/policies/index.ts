/** The one registry of policies: what `bundle.json` calls them. */

import { BundleError } from "../errors.js";
import { gridKind } from "./grid.js";
import { openKernel } from "./kernel.js";
import { mixtureKind, sharedMixtureKind } from "./mixture.js";
import type { PolicyKind } from "./policy.js";

export type { Policy, PolicyKind } from "./policy.js";

const KINDS: Record<string, (described: any) => PolicyKind | Promise<PolicyKind>> = {
  gm: async (described) => sharedMixtureKind(await openKernel(), described.num_components, described.eps),
  gmk: (described) => mixtureKind(described.num_components, described.eps),
  dx: (described) =>
    gridKind({
      numNodes: described.num_nodes,
      segmentSize: described.segment_size,
      shift: described.shift,
      mode: described.mode,
      eps: described.eps,
    }),
};

/** The kind of policy that a bundle describes, ready to be used. */
export async function openPolicy(described: any): Promise<PolicyKind> {
  const kind = described?.kind;
  if (!Object.hasOwn(KINDS, kind)) {
    throw new BundleError(`this release knows policies ${Object.keys(KINDS).join(", ")}; got ${kind}`);
  }
  return KINDS[kind](described);
}
