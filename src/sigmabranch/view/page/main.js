// The page: choosing an input, asking the server, and handing its answer to the parts.

import { draw } from "./preview.js";
import { allBytes, column } from "./network.js";
import { readable } from "./format.js";

const at = (id) => document.getElementById(id);
let show, columns;
let again; // runs the last input once more
let asked = 0; // numbers the requests, so that a late answer cannot replace a newer one

async function ask(path, options) {
  const response = await fetch(path, options).catch(() => {
    throw new Error("the server does not answer: start sigmabranch view again");
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// `manner` is "alarm", "news", or "spoken" for what the page shows anyway.
function say(text, manner) {
  at("status").textContent = text;
  at("status").className = `status ${manner}`;
}

async function run(path, body) {
  const request = ++asked;
  again = () => run(path, body);
  at("again").disabled = false;
  at("networks").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(path, { method: "POST", body });
    if (request === asked) present(answer);
  } catch (error) {
    if (request === asked) say(error.message, "alarm");
  } finally {
    if (request === asked) at("networks").setAttribute("aria-busy", "false");
  }
}

function present({ input, networks }) {
  const truth = input.truth === null ? null : readable(input.truth);
  at("input-name").textContent = input.title;
  at("truth").textContent = truth === null ? "" : `True class: ${truth}`;
  draw(at("preview"), input.preview, `${input.title}${truth === null ? "" : `, ${truth}`}`);
  const most = (of) => Math.max(...networks.map(({ trace }) => of(trace)));
  const scale = { ms: most((trace) => trace.total_ms), bytes: most((trace) => trace.bytes_read + trace.hit_bytes) };
  columns.forEach((shown, index) => shown.present(networks[index], input.truth, scale));
  const said = columns.map((shown, index) => shown.sentence(networks[index]));
  say(`${[input.title, ...said].join(". ")}.`, "spoken");
}

function runSample(number) {
  const chosen = Math.min(Math.max(Math.trunc(number) || 0, 0), show.samples - 1);
  at("number").value = chosen;
  history.replaceState(null, "", `?sample=${chosen}`);
  return run(`/samples/${chosen}`);
}

function runPicture(file) {
  if (!file) return;
  if (!show.pictures) return say("these networks take no pictures: choose a sample", "alarm");
  if (file.size > show.most_bytes) {
    return say(`${file.name} is larger than ${show.most_bytes / 1e6} MB: give a smaller picture`, "alarm");
  }
  history.replaceState(null, "", "/");
  return run("/picture", file);
}

async function forget() {
  await ask("/forget", { method: "POST" })
    .then(() => say("All weights are forgotten: the next input starts cold.", "news"))
    .catch((error) => say(error.message, "alarm"));
}

function listen() {
  const step = (by) => () => {
    const now = at("number").valueAsNumber;
    runSample(Number.isNaN(now) ? 0 : (now + by + show.samples) % show.samples);
  };
  at("previous").addEventListener("click", step(-1));
  at("next").addEventListener("click", step(1));
  at("random").addEventListener("click", () => runSample(Math.random() * show.samples));
  at("number").addEventListener("change", () => runSample(at("number").valueAsNumber));
  at("samples").addEventListener("submit", (event) => event.preventDefault());
  at("forget").addEventListener("click", forget);
  at("again").addEventListener("click", () => again());
  at("file").addEventListener("change", () => {
    runPicture(at("file").files[0]);
    at("file").value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragged");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dragged"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragged");
    runPicture(event.dataTransfer.files[0]);
  });
}

async function start() {
  show = await ask("/show");
  document.title = `${show.title} · sigmabranch view`;
  at("title").textContent = show.title;
  at("samples").hidden = !show.samples;
  at("pictures").hidden = !show.pictures;
  at("number").max = show.samples - 1;
  at("range").textContent = `0 to ${(show.samples - 1).toLocaleString("en")}`;
  const most = Math.max(...show.networks.map(allBytes));
  columns = show.networks.map((network) => column(at("networks"), network, most));
  at("networks").setAttribute("aria-busy", "false");
  listen();
  const wanted = new URLSearchParams(location.search).get("sample");
  if (show.samples && /^\d+$/.test(wanted ?? "")) await runSample(Number(wanted));
}

start().catch((error) => say(error.message, "alarm"));
