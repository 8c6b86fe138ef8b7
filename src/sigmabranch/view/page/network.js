// One network's column: its tree, its answer, what that took, and the totals.

import { megabytes, milliseconds, nodeName, percent, readable } from "./format.js";
import { Tree } from "./tree.js";

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function bar(className, share) {
  const element = make("i", className);
  element.style.width = `${100 * share}%`;
  return element;
}

const NAMES = { branched: "Branched", dense: "Dense", path: "Single path" };

export function allBytes({ nodes }) {
  return nodes.reduce((sum, { bytes }) => sum + bytes, 0);
}

// Add the column of `network` to `holder`; `most` is the bytes that a full strip stands for.
export function column(holder, network, most) {
  const article = document.getElementById("network").content.cloneNode(true).firstElementChild;
  const part = (selector) => article.querySelector(selector);
  const name = NAMES[network.kind];
  const routed = network.kind === "branched";
  part("h2").textContent = name;
  part(".size").textContent = size(network);
  part(".usage").hidden = !Object.keys(network.usage).length;
  part(".tree").setAttribute("aria-label", `Nodes of the ${name.toLowerCase()} network`);
  holder.append(article);
  const tree = new Tree(part(".tree"), network);
  const past = (shown) => {
    part(".strip").replaceChildren(...strip(shown.last_bytes_read, most));
    part(".totals").textContent = totals(shown);
  };

  return {
    present(answer, truth, scale) {
      article.classList.add("filled");
      tree.light(answer.trace);
      const heading = make("h3", "", routed ? `Answer of leaf ${answer.leaf}` : "Answer");
      part(".answer").replaceChildren(heading, ranking(answer.top, truth));
      part(".figures").replaceChildren(...figures(answer.trace));
      part(".weights .span").replaceChildren(...weights(answer.trace, scale.bytes));
      part(".bars").replaceChildren(timeline(answer.trace.nodes, network, scale.ms));
      past(answer.totals);
    },
    sentence({ top: [best], leaf, trace }) {
      const where = routed ? `, leaf ${leaf}` : "";
      const read = `${megabytes(trace.bytes_read)} MB read in ${milliseconds(trace.total_ms)} ms`;
      return `${name}: ${readable(best.class)}, ${percent(best.probability)}${where}, ${read}`;
    },
  };
}

function size(network) {
  const bytes = allBytes(network);
  const room = network.budget < bytes ? `in ${megabytes(network.budget)} MB of memory` : "which all fit in memory";
  return `${megabytes(bytes)} MB of weights, ${room}`;
}

function totals({ inputs, bytes_read: bytes }) {
  if (!inputs) return "No input yet.";
  const count = inputs === 1 ? "1 input" : `${inputs.toLocaleString("en")} inputs`;
  return `${count} so far, ${megabytes(bytes / inputs)} MB read for each on average.`;
}

function ranking(top, truth) {
  const list = make("ol");
  for (const { class: name, probability } of top) {
    const row = make("li", name === truth ? "true" : "");
    const track = make("span", "track");
    track.append(bar("", probability));
    row.append(make("span", "class", readable(name) + (name === truth ? " ✓" : "")), track, make("span", "share", percent(probability)));
    list.append(row);
  }
  return list;
}

function strip(read, most) {
  return read.map((bytes) => {
    const one = make("i");
    one.style.height = `${(100 * bytes) / most}%`;
    return one;
  });
}

function weights({ bytes_read: read, wasted_bytes: vain, hit_bytes: kept }, most) {
  return [bar("memory", kept / most), bar("read", (read - vain) / most), bar("vain", vain / most)];
}

function figures(trace) {
  const vain = trace.wasted_bytes ? `read, ${megabytes(trace.wasted_bytes)} MB of it in vain` : "read for this input";
  return [
    [megabytes(trace.bytes_read), "MB", vain],
    [megabytes(trace.hit_bytes), "MB", "was in memory"],
    [milliseconds(trace.total_ms), "ms", `of which ${milliseconds(trace.wait_ms)} ms waiting`],
  ].map(([value, unit, name]) => {
    const pair = make("div");
    const number = make("dd", "", `${value} `);
    number.append(make("small", "", unit));
    pair.append(make("dt", "", name), number);
    return pair;
  });
}

function timeline(nodes, network, slowest) {
  const list = make("ol");
  let passed = 0;
  for (const { node, wait_ms: wait, compute_ms: compute } of nodes) {
    const row = make("li");
    const span = make("span", "span");
    span.append(bar("", passed / slowest), bar("waiting", wait / slowest), bar("computing", compute / slowest));
    const numbers = make("span", "numbers", milliseconds(wait));
    numbers.append(make("span", "unseen", " ms waiting"), " + ", milliseconds(compute), " ms", make("span", "unseen", " computing"));
    row.append(make("span", "", network.nodes.length === 1 ? "whole" : nodeName(node)), span, numbers);
    list.append(row);
    passed += wait + compute;
  }
  return list;
}
