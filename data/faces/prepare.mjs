// Draw the cartoon faces -> train.npz and test.npz, 32 x 32 pixels
//
//     node prepare.mjs OUT_FOLDER [TRAIN TEST]        # images of each style: 6000 and 500
//
// The commands that install the four packages stand in data/faces/README.md.
// Image i is of style i % 10, so that the styles are balanced from the first image on.

import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import * as collection from '@dicebear/collection';
import { createAvatar } from '@dicebear/core';
import { Resvg } from '@resvg/resvg-js';
import { zipSync } from 'fflate';

const STYLES = {
  adventurer: 'Adventurer', bigEars: 'Big ears', bigSmile: 'Big smile', micah: 'Micah',
  miniavs: 'Miniavs', openPeeps: 'Open peeps', personas: 'Personas', pixelArt: 'Pixel art',
  thumbs: 'Thumbs', toonHead: 'Toon head',
};
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'ffdfbf']; // three that differ clearly: codes are few
const SIZE = 32;
const SHRINK = 4; // each face is drawn at 128 x 128 pixels first

const md5 = (data) => createHash('md5').update(data).digest('hex');

// Face number i of a style -> its pixels, SIZE x SIZE x 3 bytes
function draw(style, i) {
  // The seed is a hash, because seeds that resemble each other give faces that do.
  const options = { seed: md5(`${style} ${i}`) };
  if (style !== 'thumbs') { // thumbs come with backgrounds of their own
    options.backgroundColor = BACKGROUNDS;
  }
  const svg = createAvatar(collection[style], options).toString();
  const renderer = new Resvg(svg, {
    background: 'white', fitTo: { mode: 'width', value: SIZE * SHRINK },
    font: { loadSystemFonts: false },
  });
  return shrink(renderer.render().pixels);
}

// Average squares of 4 x 4 pixels, which is what ADM's reduction of 128 pixels to 32 does: it
// halves twice by a box filter
function shrink(rgba) {
  const pixels = new Uint8Array(SIZE * SIZE * 3);
  for (let row = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let y = row * SHRINK; y < (row + 1) * SHRINK; y++) {
          for (let x = column * SHRINK; x < (column + 1) * SHRINK; x++) {
            sum += rgba[(y * SIZE * SHRINK + x) * 4 + channel];
          }
        }
        pixels[(row * SIZE + column) * 3 + channel] = Math.round(sum / SHRINK ** 2);
      }
    }
  }
  return pixels;
}

// n pictures of a style, no two of them equal
function drawDistinct(style, n) {
  const seen = new Set();
  const pictures = [];
  let drawn = 0;
  while (pictures.length < n) {
    const pixels = draw(style, drawn);
    drawn += 1;
    const hash = md5(pixels);
    if (!seen.has(hash)) {
      seen.add(hash);
      pictures.push(pixels);
    }
  }
  console.log(`${style}: ${drawn} drawn, ${drawn - n} dropped as equal to an earlier one`);
  return pictures;
}

// An array as the bytes of a .npy file
function npy(type, shape, values) {
  const tuple = shape.join(', ') + (shape.length === 1 ? ',' : '');
  const text = `{'descr': '${type}', 'fortran_order': False, 'shape': (${tuple}), }`;
  const header = Buffer.alloc(64 * Math.ceil((text.length + 11) / 64), ' ');
  header.write('\x93NUMPY\x01\x00', 'latin1');
  header.writeUInt16LE(header.length - 10, 8);
  header.write(text, 10);
  header.write('\n', header.length - 1);
  return Buffer.concat([header, Buffer.from(values.buffer)]);
}

// Names as numpy keeps them: 32 bits a character, padded with zeros to the longest
function npyOfNames(names) {
  const width = Math.max(...names.map((name) => name.length));
  const characters = new Uint32Array(names.length * width);
  names.forEach((name, i) => {
    characters.set([...name].map((character) => character.codePointAt(0)), i * width);
  });
  return npy(`<U${width}`, [names.length], characters);
}

// pictures: one array for each style. Writes the pictures first to last of every style.
function save(file, pictures, first, last) {
  const images = [];
  const labels = [];
  for (let i = first; i < last; i++) {
    pictures.forEach((ofStyle, label) => {
      images.push(ofStyle[i]);
      labels.push(BigInt(label));
    });
  }
  const pixels = new Uint8Array(Buffer.concat(images));
  fs.writeFileSync(file, zipSync({
    'arr_0.npy': npy('|u1', [images.length, SIZE, SIZE, 3], pixels),
    'labels.npy': npy('<i8', [labels.length], new BigInt64Array(labels)),
    'classes.npy': npyOfNames(Object.values(STYLES)),
  }, { level: 0 }));
}

const folder = process.argv[2];
const train = Number(process.argv[3] ?? 6000);
const test = Number(process.argv[4] ?? 500);
const pictures = Object.keys(STYLES).map((style) => drawDistinct(style, train + test));
fs.mkdirSync(folder, { recursive: true });
save(path.join(folder, 'train.npz'), pictures, 0, train);
save(path.join(folder, 'test.npz'), pictures, train, train + test);
