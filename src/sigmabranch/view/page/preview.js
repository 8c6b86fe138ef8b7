// The input as the network sees it: pixels, or a cloud of points from the side.

const SIDE = 512;

export function draw(canvas, preview, label) {
  canvas.setAttribute("aria-label", label);
  canvas.classList.toggle("smooth", !preview.pixels || preview.width >= 160);
  if (preview.points) drawPoints(canvas, preview.points);
  else drawPixels(canvas, preview);
}

function drawPixels(canvas, { width, height, channels, pixels }) {
  const bytes = Uint8Array.from(atob(pixels), (character) => character.charCodeAt(0));
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let colour = 0; colour < 3; colour++) {
      image.data[4 * pixel + colour] = bytes[pixel * channels + Math.min(colour, channels - 1)];
    }
    image.data[4 * pixel + 3] = 255;
  }
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawPoints(canvas, points) {
  Object.assign(canvas, { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  const seen = points.map(([x, y, z]) => {
    const [along, away] = [0.8 * x - 0.6 * y, 0.6 * x + 0.8 * y];
    return { along, up: 0.94 * z + 0.34 * away, depth: 0.94 * away - 0.34 * z };
  });
  seen.sort((one, other) => other.depth - one.depth);
  for (const { along, up, depth } of seen) {
    const near = Math.min(Math.max((1 - depth) / 2, 0), 1);
    context.globalAlpha = 0.2 + 0.7 * near;
    context.beginPath();
    context.arc(SIDE * (0.5 + 0.42 * along), SIDE * (0.5 - 0.42 * up), 2 + 3 * near, 0, 7);
    context.fill();
  }
}
