// The half of onefold's runtime `web` that runs in Node.js: it opens one network with onnxruntime-web and answers images.
//
//   node web.mjs NODE_MODULES
//
// Messages are a length (uint32) and as many bytes, little-endian, on stdin and stdout.
// The first holds the number of threads (uint32) and the network (ONNX); each one after it the four sizes of its images
// (uint32: B, C, H, W) and the images (float32). An answer is a status (uint32) and, where it is 0, the number of
// threads in use (uint32) to the first and the logits (float32) to the others; where it is 1, what went wrong (UTF-8),
// and where it is 2, what is wrong with the package (UTF-8).

import { createRequire } from "node:module";
import { join } from "node:path";

const SIZES = 16;

// Whatever a library says goes to stderr: stdout carries the answers.
console.log = console.info = console.debug = console.warn = console.error;

async function* messages(stream) {
  let filled = 0;
  const length = Buffer.alloc(4);
  let body = null;
  for await (let chunk of stream) {
    while (chunk.length > 0) {
      const target = body ?? length;
      const taken = chunk.copy(target, filled);
      filled += taken;
      chunk = chunk.subarray(taken);
      if (filled < target.length) break;
      filled = 0;
      if (body === null) {
        body = Buffer.alloc(length.readUInt32LE());
      } else {
        yield body;
        body = null;
      }
    }
  }
}

function send(status, bytes) {
  const head = Buffer.alloc(8);
  head.writeUInt32LE(4 + bytes.length, 0);
  head.writeUInt32LE(status, 4);
  process.stdout.write(Buffer.concat([head, bytes]));
}

async function open(message) {
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = message.readUInt32LE();
  const opened = await ort.InferenceSession.create(message.subarray(4), { executionProviders: ["wasm"] });
  const threads = Buffer.alloc(4);
  threads.writeUInt32LE(ort.env.wasm.numThreads);
  send(0, threads);
  return opened;
}

async function answer(message) {
  const sizes = [0, 4, 8, 12].map((at) => message.readUInt32LE(at));
  const images = new Float32Array(message.buffer, message.byteOffset + SIZES, (message.length - SIZES) / 4);
  const { logits } = await session.run({ images: new ort.Tensor("float32", images, sizes) });
  send(0, Buffer.from(logits.data.buffer, logits.data.byteOffset, logits.data.byteLength));
}

let ort = null;
let session = null;
for await (const message of messages(process.stdin)) {
  try {
    ort ??= createRequire(import.meta.url)(join(process.argv[2], "onnxruntime-web"));
    if (session === null) session = await open(message);
    else await answer(message);
  } catch (error) {
    send(ort === null ? 2 : 1, Buffer.from(String(error?.message ?? error)));
  }
}
process.exit(0);
