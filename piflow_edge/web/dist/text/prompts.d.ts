/** Prompts: texts that the bundle's own encoders turn into what the network takes. As `piflow_edge/conditioning/text.py`. */
import type { Bundle } from "../bundle.js";
import { type Conditioner, type RunNetwork } from "../conditioning.js";
/** A text encoder, as the bundle describes it. */
export interface EncoderSpec {
    name: string;
    max_tokens: number;
    template: string;
    pad_to_max: boolean;
    pad_id: number;
    pad_left: boolean;
    sees_padding: boolean;
    drop_tokens: number;
    hidden_input: string | null;
    mask_input: string | null;
    pooled_input: string | null;
    fixed_length: boolean;
}
/** The conditioner of a bundle that reads prompts. */
export declare function openPrompts(described: any, bundle: Bundle, run: RunNetwork): Promise<Conditioner>;
