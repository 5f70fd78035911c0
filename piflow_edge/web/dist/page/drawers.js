/** The two that draw: this browser, in a worker, and the server that the page came from. */
import { Cancelled } from "../errors.js";
/** What goes wrong where a server wants a key. */
export class KeyNeeded extends Error {
}
/** A worker with an opened bundle. `provider`: of ONNX Runtime, "wasm" or "webgpu". */
export async function openInBrowser(bundle, ort, provider) {
    const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    const send = (order) => worker.postMessage(order);
    const opened = await new Promise((resolve, reject) => {
        worker.addEventListener("message", ({ data }) => resolve(data), { once: true });
        worker.addEventListener("error", (event) => reject(new Error(event.message || "the worker cannot start")), { once: true });
        send({ kind: "open", bundle, ort, provider });
    });
    if (opened.kind !== "opened") {
        worker.terminate();
        throw new Error(opened.kind === "failed" ? opened.message : "the worker answers out of turn");
    }
    function draw(wish, report, signal) {
        return new Promise((resolve, reject) => {
            function listen({ data }) {
                if (data.kind === "report")
                    return report(data.report);
                worker.removeEventListener("message", listen);
                if (data.kind === "drawn")
                    resolve(data.drawn);
                else if (data.kind === "failed")
                    reject(data.isCancelled ? new Cancelled(data.message) : new Error(data.message));
            }
            worker.addEventListener("message", listen);
            signal.addEventListener("abort", () => send({ kind: "stop" }), { once: true });
            send({ kind: "draw", wish });
        });
    }
    return [{ draw, close: () => worker.terminate() }, opened.ms];
}
/** `piflow-edge serve`. `field`: of its native endpoint that says what to draw. `readKey`: the key that it wants, if any. */
export function openOnServer(bundle, field, readKey) {
    async function draw(wish, report, signal) {
        const key = readKey();
        const { subject, seed, nfe } = wish;
        const answer = await fetch("v1/generate", {
            method: "POST",
            signal,
            headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
            body: JSON.stringify({ bundle, [field]: subject, seed, nfe, stream: true, previews: true }),
        });
        if (answer.status === 401)
            throw new KeyNeeded("This server asks for its API key.");
        if (!answer.ok || !answer.body)
            throw new Error((await answer.json()).error.message);
        for await (const [name, body] of readEvents(answer.body)) {
            if (name === "error")
                throw new Error(body.message);
            if (name === "progress") {
                const preview = body.previews ? await readPicture(await toBlob(body.previews[0])) : null;
                report({ call: body.call, nfe: body.nfe, preview });
            }
            if (name === "result") {
                const file = await toBlob(body.images[0].b64_json);
                return { picture: await readPicture(file), file, timings: body.timings_ms };
            }
        }
        throw new Error("the server closed the connection");
    }
    return { draw, close: () => undefined };
}
/** Server-sent events: their names and what they hold. */
async function* readEvents(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
        const { value, done } = await reader.read();
        if (done)
            return;
        text += value;
        for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
            const event = /^event: (.*)\ndata: (.*)$/.exec(text.slice(0, end));
            text = text.slice(end + 2);
            if (event)
                yield [event[1], JSON.parse(event[2])];
        }
    }
}
async function toBlob(base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    return new Blob([bytes], { type: "image/png" });
}
async function readPicture(file) {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0);
    const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
    return { width, height, rgba: data };
}
