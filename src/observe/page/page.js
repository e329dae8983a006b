
/* The status page: shows what /events says, once a second, and only reads. All text goes in as text, never as markup. */
"use strict";

const byId = (id) => document.getElementById(id);
const units = ["B", "KiB", "MiB", "GiB", "TiB"];

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit === 0 ? bytes : bytes.toFixed(1)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${seconds.toFixed(1)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

const count = (number) => Math.round(number).toLocaleString("en");

function set(id, text, kind) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
  if (kind !== undefined) element.className = `figure ${kind}`;
}

function list(id, section, texts) {
  byId(section).hidden = texts.length === 0;
  byId(id).replaceChildren(...texts.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

const phases = ["preparing", "copying", "indexing", "catching_up", "following", "cutting_over", "cut_over"];
let reached = 0;

function showPhase(status) {
  const at = phases.indexOf(status.phase);
  if (at >= 0) reached = at;
  const steps = phases.map((phase, step) => {
    const item = document.createElement("li");
    item.textContent = phase.replace("_", " ");
    if (step < reached) item.className = "past";
    if (step === reached) {
      item.className = status.phase === "failed" ? "failed" : "now";
      item.setAttribute("aria-current", "step");
      if (status.phase === "failed") item.textContent += ": failed";
      if (status.phase === "reversed") item.textContent = "switched back";
    }
    return item;
  });
  byId("phases").replaceChildren(...steps);
}

/* What can be typed now; as the terminal says it. */
function whatNext(status) {
  const back = status.direction === "back";
  if (status.error) return null;
  if (status.phase === "cut_over" && back) return ["good", "The target is the primary", "The old one is kept current: walferry switchback leads back, walferry finish ends that."];
  if (status.phase === "cut_over") return ["good", "Done", "The target is the primary now."];
  if (status.phase === "reversed") return ["good", "Switched back", "The old primary is the primary again."];
  if (status.phase === "cutting_over") return ["", "Cutting over", "Writers are held, or about to be. It ends by itself: switched, or given up after --timeout and --max-write-stall, and then it follows as before."];
  if (!status.ready_to_cutover) return null;
  const way = status.way_back === "ready" ? "With a way back. " : "";
  return ["good", "Ready to cut over", `${way}walferry cutover --dry-run rehearses it, walferry cutover does it.`];
}

function showNext(status) {
  const next = whatNext(status);
  byId("next").hidden = !next;
  if (!next) return;
  byId("next").className = `notice ${next[0]}`;
  set("next-title", next[1]);
  set("next-text", next[2]);
}

function showTables(status) {
  const copy = status.copy;
  /* On the way back nothing is copied. */
  byId("copy").hidden = status.direction === "back" || copy.tables_total === 0;
  const done = copy.bytes_total === 0 ? 1 : Math.min(1, copy.bytes_done / copy.bytes_total);
  const left = status.eta_seconds === null || done === 1 ? "" : `, about ${duration(status.eta_seconds)} left`;
  const rate = copy.bytes_per_second > 0 ? `, ${size(copy.bytes_per_second)}/s` : "";
  const held = copy.paused ? ", held by the operator" : copy.waits_for ? `, waits for ${copy.waits_for}` : "";
  const indexes = status.indexes.total ? `; ${status.indexes.done} of ${status.indexes.total} indexes and keys` : "";
  set("copy-text", `${copy.tables_done} of ${copy.tables_total} tables, ${size(copy.bytes_done)} of ${size(copy.bytes_total)}${rate}${left}${held}${indexes}`);
  byId("copy-share").value = done;
  const order = { copying: 0, indexing: 1, waiting: 2, done: 3 };
  const tables = [...status.tables].sort((one, other) => order[one.state] - order[other.state] || other.bytes_total - one.bytes_total);
  const shown = tables.slice(0, 25);
  byId("tables").replaceChildren(...shown.map((table) => {
    const row = document.createElement("tr");
    const cell = (text, kind) => row.append(Object.assign(document.createElement("td"), { textContent: text, className: kind || "" }));
    cell(`${table.schema}.${table.name}`);
    cell(table.state);
    cell(count(table.rows_done), "number");
    cell(size(table.bytes_total), "number");
    const share = table.bytes_total === 0 ? Number(table.state === "done") : Math.min(1, table.bytes_done / table.bytes_total);
    const bar = Object.assign(document.createElement("progress"), { max: 1, value: share });
    bar.setAttribute("aria-label", `${Math.floor(share * 100)} % of ${table.name}`);
    const last = document.createElement("td");
    last.append(bar);
    row.append(last);
    return row;
  }));
  const more = copy.tables_total - shown.length;
  set("tables-more", more > 0 ? `and ${count(more)} more` : "");
}

function show(status) {
  document.title = `${status.phase.replace("_", " ")} · walferry`;
  set("source", status.source.description || "source");
  set("target", status.target.description || "target");
  showPhase(status);
  showNext(status);
  byId("failure").hidden = !status.error;
  if (status.error) {
    set("failure-message", status.error.message);
    set("failure-hint", status.error.hint ? `Next: ${status.error.hint}` : "");
  }
  const lag = status.lag.seconds;
  set("lag", duration(lag), lag === null ? "" : lag > 60 ? "bad" : lag > 10 ? "warn" : "good");
  set("lag-bytes", status.lag.bytes === null ? "" : `${size(status.lag.bytes)} of WAL`);
  set("switch", status.direction === "back" ? "Switchback" : "Cutover");
  const over = ["cut_over", "reversed"].includes(status.phase);
  const running = status.phase === "cutting_over";
  set("ready", status.ready_to_cutover ? "ready" : over ? "done" : running ? "running" : "not yet", status.ready_to_cutover || over ? "good" : running ? "warn" : "");
  const wait = status.cutover.expected_downtime_ms;
  set("expected", wait === null ? "" : `writers would wait about ${duration(wait / 1000)}`);
  set("applied", `${count(status.apply.changes_per_second)}/s`);
  const held = status.apply.paused ? "held by the operator" : `${count(status.apply.transactions_per_second)} transactions/s`;
  if (status.phase === "preparing") set("received", "");
  else set("received", held + (status.stream.connected ? `, ${size(status.stream.bytes_per_second)}/s received` : ", the source is not connected"));
  const queue = status.queue;
  set("queue", size(queue.bytes), queue.full ? "bad" : queue.bytes > 0.8 * queue.limit_bytes && queue.limit_bytes ? "warn" : "");
  byId("queue-share").value = queue.limit_bytes ? queue.bytes / queue.limit_bytes : 0;
  set("queue-limit", queue.full ? "full: the source is not read" : queue.limit_bytes ? `of ${size(queue.limit_bytes)}` : "");
  const { retained_wal_bytes: retained, wal_max_bytes: max } = status.source;
  set("retained", size(retained), retained !== null && max !== null && retained > max ? "bad" : "");
  set("retained-max", max === null ? "" : `may be ${size(max)}`);
  const verified = status.verification;
  set("compared", !verified ? "not yet" : verified.equal ? "equal" : "different", !verified ? "" : verified.equal ? "good" : "bad");
  set("compared-rows", !verified ? "walferry verify" : `${count(verified.rows)} rows, ${duration(verified.age_seconds)} ago`);
  const asked = ["following", "catching_up"].includes(status.phase) || (status.direction === "back" && status.phase === "cut_over");
  list("blockers", "blocking", status.ready_to_cutover || !asked ? [] : status.blockers);
  list("attention", "looking", status.attention);
  showTables(status);
  byId("events").replaceChildren(...[...status.events].reverse().slice(0, 30).map((event) => {
    const item = document.createElement("li");
    const time = Object.assign(document.createElement("time"), { dateTime: event.time, textContent: event.time.slice(0, 19).replace("T", " ") });
    item.append(time, Object.assign(document.createElement("span"), { className: event.level, textContent: event.text }));
    return item;
  }));
}

/* Plots: times in seconds, then a row of numbers for each line. */
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const MAX_POINTS = 3600;

const clock = (time) => new Date(time * 1000).toTimeString().slice(0, 8);

function plot(id, names, least) {
  const host = byId(id);
  const axis = { stroke: () => color("--muted"), grid: { stroke: () => color("--line"), width: 1 }, ticks: { stroke: () => color("--line") } };
  const format = (_, value) => (value === null || value === undefined ? "–" : value.toFixed(value < 10 ? 2 : 0));
  const lines = names.map((label, place) => ({ label, stroke: () => color(place === 0 ? "--first" : "--second"), width: 1.5, value: format, points: { show: false } }));
  const data = [[], ...names.map(() => [])];
  const options = {
    width: host.clientWidth || 300, height: 150, series: [{ label: "at", value: (_, time) => (time ? clock(time) : "–") }, ...lines],
    axes: [{ ...axis, space: 70, values: (_, times) => times.map(clock) }, { ...axis, size: 52 }], scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, least) * 1.1] } },
  };
  const chart = new uPlot(options, data, host);
  new ResizeObserver(() => chart.setSize({ width: host.clientWidth, height: 150 })).observe(host);
  return {
    add(time, values) {
      data[0].push(time);
      values.forEach((value, place) => data[place + 1].push(value));
      if (data[0].length > MAX_POINTS) data.forEach((row) => row.shift());
    },
    draw: () => chart.setData(data),
    redraw: () => chart.redraw(),
  };
}

const mebibytes = (bytes) => (bytes === null ? null : bytes / 1048576);

function start() {
  const plots = {
    lag: plot("plot-lag", ["behind"], 0.1),
    changes: plot("plot-changes", ["changes/s"], 10),
    bytes: plot("plot-bytes", ["copied", "received"], 0.1),
    disk: plot("plot-disk", ["queue", "WAL"], 1),
  };
  const point = (time, lag, changes, copied, received, queue, retained) => {
    plots.lag.add(time, [lag]);
    plots.changes.add(time, [changes]);
    plots.bytes.add(time, [mebibytes(copied), mebibytes(received)]);
    plots.disk.add(time, [mebibytes(queue), mebibytes(retained)]);
  };
  const draw = () => Object.values(plots).forEach((each) => each.draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Object.values(plots).forEach((each) => each.redraw()));

  let last = 0;
  const received = (status) => {
    last = Date.now();
    byId("connection").className = "muted";
    set("connection", `as of ${status.updated_at.slice(11, 19)} UTC`);
    show(status);
    point(Date.parse(status.updated_at) / 1000, status.lag.seconds, status.apply.changes_per_second, status.copy.bytes_per_second,
      status.stream.bytes_per_second, status.queue.bytes, status.source.retained_wal_bytes);
    draw();
  };
  const follow = () => {
    const events = new EventSource("events");
    events.onmessage = (event) => received(JSON.parse(event.data));
    events.onerror = () => {
      // Too many look at once: then it is asked now and then instead.
      if (events.readyState === EventSource.CLOSED) {
        fetch("status").then((answer) => answer.json()).then(received).catch(() => {}).finally(() => setTimeout(follow, 3000));
      }
    };
  };
  setInterval(() => {
    if (last && Date.now() - last > 5000) {
      byId("connection").className = "bad";
      set("connection", `no answer for ${duration((Date.now() - last) / 1000)}: walferry may have stopped`);
    }
  }, 1000);
  fetch("history")
    .then((answer) => answer.json())
    .then((points) => points.forEach((each) => point(each.time / 1000, each.lag_seconds, each.changes_per_second,
      each.copied_bytes_per_second, each.received_bytes_per_second, each.queue_bytes, each.retained_wal_bytes)))
    .catch(() => {})
    .finally(follow);
}

start();
