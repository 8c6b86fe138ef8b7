// The tree, left to right: a box a node, a bar for its bytes, and the path of the last input lit.

import { megabytes, nodeName, percent } from "./format.js";

const BOX = { least: 92, most: 180, height: 68 };
const ROW = 80;
const GAP = { least: 22, most: 56 };
const STEP_MS = 160; // from a node of the path to the next

function make(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function parentOf(key) {
  if (key === "root") return null;
  return key.includes("-") ? key.slice(0, key.lastIndexOf("-")) : "root";
}

function levelOf(key) {
  return key === "root" ? 0 : key.split("-").length;
}

// Row of every node: leaves from top to bottom, the others in the middle of their children.
function rowsOf(keys) {
  const rows = {};
  let leaves = 0;
  const place = (key) => {
    const children = keys.filter((other) => parentOf(other) === key);
    children.forEach(place);
    rows[key] = children.length
      ? children.reduce((sum, child) => sum + rows[child], 0) / children.length
      : leaves++;
  };
  place("root");
  return { rows, leaves };
}

export class Tree {
  constructor(holder, { nodes, usage }) {
    Object.assign(this, { holder, nodes, usage, trace: null });
    this.largest = Math.max(...nodes.map(({ bytes }) => bytes));
    this.keys = nodes.map(({ node }) => node);
    this.depth = Math.max(...this.keys.map(levelOf));
    this.place = rowsOf(this.keys);
    let width = 0;
    new ResizeObserver(() => {
      if (holder.clientWidth !== width) this.build((width = holder.clientWidth));
    }).observe(holder);
  }

  build(width) {
    const columns = this.depth + 1;
    const gap = Math.min(Math.max(width / columns / 3.6, GAP.least), GAP.most);
    const fitting = (width - this.depth * gap - 2) / columns;
    this.box = columns === 1 ? fitting : Math.min(Math.max(fitting, BOX.least), BOX.most);
    this.gap = columns === 1 ? 0 : Math.max(gap, Math.min((width - 2 - columns * this.box) / this.depth, 2 * GAP.most));
    const total = columns * this.box + this.depth * this.gap;
    const height = this.place.leaves * ROW - (ROW - BOX.height);
    this.holder.replaceChildren();
    // One node alone is as tall as the tree beside it.
    const tall = columns === 1 ? "100%" : height;
    this.svg = make(this.holder, "svg", { width: total, height: tall, role: "img" });
    this.svg.classList.toggle("alone", columns === 1);
    this.links = Object.fromEntries(this.keys.slice(1).map((key) => [key, this.link(key)]));
    this.boxes = Object.fromEntries(this.nodes.map((node) => [node.node, this.node(node)]));
    this.light(this.trace, false);
  }

  left(key) {
    return levelOf(key) * (this.box + this.gap);
  }

  link(key) {
    const [from, to] = [parentOf(key), key].map((node) => this.place.rows[node] * ROW + BOX.height / 2);
    const [start, end] = [this.left(parentOf(key)) + this.box, this.left(key)];
    const bend = (start + end) / 2;
    return make(this.svg, "path", { class: "link", d: `M${start} ${from}C${bend} ${from} ${bend} ${to} ${end} ${to}` });
  }

  node({ node: key, bytes }) {
    const group = make(this.svg, "g", { transform: `translate(${this.left(key)} ${this.place.rows[key] * ROW})` });
    const [width, inside] = [this.box, this.box - 20];
    const alone = this.nodes.length === 1;
    make(group, "rect", { class: "box", width, height: alone ? "100%" : BOX.height, rx: 8 });
    make(group, "text", { class: "name", x: 10, y: 19 }, alone ? "whole network" : nodeName(key));
    if (this.usage[key] !== undefined) {
      const share = make(group, "text", { x: width - 10, y: 19, "text-anchor": "end" }, percent(this.usage[key]));
      make(share, "title", {}, "share of the inputs, when it was packed");
    }
    make(group, "text", { x: 10, y: 34 }, `${megabytes(bytes)} MB`);
    const state = make(group, "text", { class: "state", x: 10, y: 49 }, "");
    const size = Math.max((inside * bytes) / this.largest, 2);
    const bar = { x: 10, y: BOX.height - 11, height: 5, rx: 1.5 };
    make(group, "rect", { ...bar, class: "size", width: size });
    const memory = make(group, "rect", { ...bar, class: "memory", width: 0 });
    const read = make(group, "rect", { ...bar, class: "read", width: 0 });
    return { group, state, size, memory, read, start: bar.x };
  }

  // Show what a prediction took, node after node.
  light(trace, slowly = true) {
    this.trace = trace;
    const path = trace?.nodes ?? [];
    this.svg.setAttribute("aria-label", this.described(path));
    for (const key of this.keys) {
      const step = path.findIndex(({ node }) => node === key);
      const delay = slowly && step >= 0 ? `${step * STEP_MS}ms` : "0ms";
      const [box, link] = [this.boxes[key], this.links[key]];
      for (const element of [box.group.firstChild, link]) {
        if (element) element.style.transitionDelay = delay;
      }
      box.group.classList.toggle("lit", step >= 0);
      link?.classList.toggle("lit", step >= 0);
      if (link && step >= 0) link.parentNode.insertBefore(link, this.boxes.root.group);
      this.fill(box, path[step]);
    }
  }

  fill({ state, size, memory, read, start }, node) {
    const kept = node ? (size * node.hit_bytes) / (node.bytes || 1) : 0;
    memory.setAttribute("width", kept);
    read.setAttribute("x", start + kept);
    read.setAttribute("width", node ? size - kept : 0);
    state.textContent = node ? source(node) : "";
  }

  described(path) {
    const sizes = this.nodes.map(({ node, bytes }) => `${nodeName(node)} ${megabytes(bytes)} MB`);
    const taken = path.map((node) => `${nodeName(node.node)} ${source(node)}`);
    return `Tree of ${sizes.join(", ")}. ${taken.length ? `Path: ${taken.join(", ")}.` : "No path yet."}`;
  }
}

function source({ bytes, hit_bytes: kept }) {
  if (kept >= bytes) return "in memory";
  return kept ? `${percent(1 - kept / bytes)} read` : "read now";
}
