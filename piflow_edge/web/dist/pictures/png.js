/** PNG files that hold the recipe of their image, as `piflow-edge sample` writes them. */
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
/** PNG's numbers of colour types, by channels. */
const COLOURS = { 1: 0, 3: 2, 4: 6 };
const KEY = "piflow-edge";
/** The image as a PNG file. `recipe`: JSON in ASCII, which `piflow-edge sample --like` reads. */
export async function encodePng(image, recipe) {
    const { width, height, channels, data } = image;
    const header = new Uint8Array(13);
    const view = new DataView(header.buffer);
    view.setUint32(0, width);
    view.setUint32(4, height);
    header.set([8, COLOURS[channels], 0, 0, 0], 8); // 8 bits a channel, not interlaced
    const stride = width * channels;
    const rows = new Uint8Array(height * (stride + 1)); // each row begins with 0: it is not filtered
    for (let y = 0; y < height; y++)
        rows.set(data.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
    const chunks = [writeChunk("IHDR", header)];
    if (recipe !== undefined)
        chunks.push(writeChunk("tEXt", new TextEncoder().encode(`${KEY}\0${recipe}`)));
    chunks.push(writeChunk("IDAT", await deflate(rows)), writeChunk("IEND", new Uint8Array()));
    return join([Uint8Array.from(SIGNATURE), ...chunks]);
}
async function deflate(data) {
    const stream = new Blob([data]).stream().pipeThrough(new CompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
}
function writeChunk(name, data) {
    const chunk = new Uint8Array(12 + data.length);
    const view = new DataView(chunk.buffer);
    view.setUint32(0, data.length);
    chunk.set(new TextEncoder().encode(name), 4);
    chunk.set(data, 8);
    view.setUint32(8 + data.length, computeCrc(chunk.subarray(4, 8 + data.length)));
    return chunk;
}
/** CRC-32, as PNG's specification defines it. */
function computeCrc(data) {
    let crc = 0xffffffff;
    for (const byte of data) {
        crc ^= byte;
        for (let bit = 0; bit < 8; bit++)
            crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
    }
    return (crc ^ 0xffffffff) >>> 0;
}
function join(parts) {
    const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
        whole.set(part, at);
        at += part.length;
    }
    return whole;
}
