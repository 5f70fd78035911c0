/** The one registry of policies: what `bundle.json` calls them. */
import type { PolicyKind } from "./policy.js";
export type { Policy, PolicyKind } from "./policy.js";
/** The kind of policy that a bundle describes, ready to be used. */
export declare function openPolicy(described: any): Promise<PolicyKind>;
