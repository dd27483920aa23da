// UpscalerJS's esrgan-thick, x4, over a folder of PNG images. A program, not a test:
//
//     npm install @upscalerjs/esrgan-thick@1.0.0 @tensorflow/tfjs@4.11.0 \
//         @tensorflow/tfjs-backend-wasm@4.11.0 pngjs
//     node tests/competitors.mjs Set14/LR_bicubic_x4 results/esrgan-thick
//
// Run node in the folder that holds node_modules. tfjs computes the network in WebAssembly.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const require = createRequire(path.resolve("node_modules", "x"));
const tf = require("@tensorflow/tfjs");
const wasm = require("@tensorflow/tfjs-backend-wasm");
const { PNG } = require("pngjs");
const definition = require("@upscalerjs/esrgan-thick/4x");
const folder = path.resolve("node_modules/@upscalerjs/esrgan-thick");

// Read the network from the package: its layers, then its weights.
async function load() {
    definition.setup(tf);                                        // its own kinds of layers
    const file = path.join(folder, definition._internals.path);
    const model = JSON.parse(fs.readFileSync(file));
    const parts = [];
    const specs = [];
    for (const group of model.weightsManifest) {
        specs.push(...group.weights);
        for (const name of group.paths) {
            parts.push(fs.readFileSync(path.join(path.dirname(file), name)));
        }
    }
    const bytes = new Uint8Array(Buffer.concat(parts));
    return tf.loadLayersModel(tf.io.fromMemory({
        modelTopology: model.modelTopology, weightSpecs: specs, weightData: bytes.buffer }));
}

// Upscale one image. The network's input and output are [1, h, w, 3] in [0, 1].
async function upscale(network, png) {
    const rgba = tf.tensor(new Uint8Array(png.data), [1, png.height, png.width, 4], "int32");
    const lr = rgba.slice([0, 0, 0, 0], [-1, -1, -1, 3]).toFloat().div(255);
    const sr = network.predict(lr).mul(255).round().clipByValue(0, 255).toInt().squeeze();
    const [height, width] = sr.shape;
    const pixels = await sr.data();
    const result = new PNG({ width, height });
    for (let i = 0; i < height * width; i++) {
        result.data.set([pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2], 255], 4 * i);
    }
    tf.dispose([rgba, lr, sr]);
    return result;
}

const [source, target] = process.argv.slice(2);
const backend = require.resolve("@tensorflow/tfjs-backend-wasm");
wasm.setWasmPaths(path.dirname(backend) + "/");
await tf.setBackend("wasm");
console.log("backend", tf.getBackend(), "tfjs", tf.version.tfjs);
const network = await load();
fs.mkdirSync(target, { recursive: true });
for (const name of fs.readdirSync(source)) {
    const sr = await upscale(network, PNG.sync.read(fs.readFileSync(path.join(source, name))));
    fs.writeFileSync(path.join(target, name), PNG.sync.write(sr));
    console.log(name, sr.width, sr.height);
}
