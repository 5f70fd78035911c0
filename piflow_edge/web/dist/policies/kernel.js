/** The rollout of Gaussian mixtures in WebAssembly: `piflow_edge/kernels`, with the rounding of its baseline on x86-64. */
import { EngineError } from "../errors.js";
const ALIGNED = 64;
const PAGE = 65536;
export class Kernel {
    exports;
    constructor(exports) {
        this.exports = exports;
    }
    static async open() {
        const { ROLLOUT } = await import("./rollout_wasm.js"); // late: a page that a server draws for needs none
        const bytes = Uint8Array.from(atob(ROLLOUT), (letter) => letter.charCodeAt(0));
        const { instance } = await WebAssembly.instantiate(bytes);
        return new Kernel(instance.exports);
    }
    /** The state, (C, pixels), after Euler steps along noise levels. */
    rollout(mixture, state, sigmas) {
        const { components, channels, pixels, sigmaSrc, variance, eps } = mixture;
        const { memory, __heap_base, bytes_of_substep, bytes_of_pixels, gm_rollout } = this.exports;
        const substeps = sigmas.length - 1;
        // A state that is the source itself is read there: the kernel then knows that it has not moved.
        const starts = state === mixture.xSrc ? [] : [state];
        const arrays = [mixture.means, mixture.logweights, mixture.xSrc, sigmas, ...starts];
        const working = [state.byteLength, bytes_of_substep() * substeps, bytes_of_pixels(components, channels)];
        const places = [];
        let end = __heap_base.value;
        for (const bytes of [...arrays.map((array) => array.byteLength), ...working]) {
            const place = Math.ceil(end / ALIGNED) * ALIGNED;
            places.push(place);
            end = place + bytes;
        }
        const missing = Math.ceil((end - memory.buffer.byteLength) / PAGE);
        if (missing > 0)
            memory.grow(missing);
        arrays.forEach((array, i) => {
            const Numbers = array.constructor;
            new Numbers(memory.buffer, places[i], array.length).set(array);
        });
        const [means, logweights, xSrc, levels] = places;
        const start = starts.length ? places[4] : xSrc;
        const [made, steps, work] = places.slice(arrays.length);
        gm_rollout(...[components, channels, pixels, substeps, means, logweights, xSrc, start, made, levels], ...[sigmaSrc, variance, eps, steps, work]);
        return new Float32Array(memory.buffer, made, state.length).slice();
    }
}
let opened;
/** The kernel, which all generators share. */
export function openKernel() {
    return (opened ??= Kernel.open().catch((error) => {
        opened = undefined; // what failed may work the next time, such as a connection
        throw new EngineError(`the kernel of Gaussian mixtures cannot be opened: ${error.message}`, { cause: error });
    }));
}
