/* Draws the report: charts from their JSON, and the trajectory browser. Text reaches the page by textContent alone. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  function node(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // ---- charts ------------------------------------------------------------------------------------------------------
  const config = { responsive: true, displayModeBar: false };

  function drawCurves(axis) {
    for (const [name, figures] of Object.entries(data.curves)) {
      Plotly.react(byId("chart-" + name), figures[axis].data, figures[axis].layout, config);
    }
    document.body.dataset.axis = axis;
  }

  for (const [name, figure] of Object.entries(data.figures)) {
    Plotly.newPlot(byId("chart-" + name), figure.data, figure.layout, config);
  }
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => drawCurves(input.value));
  }
  drawCurves("steps");

  // ---- trajectory browser ------------------------------------------------------------------------------------------
  const groups = data.groups;
  if (!groups.length) return;
  const EDGES = [0.9, 0.5, 0.2, 0.05, 0.01]; // probabilities: at least this is class p0, p1, …; less than all is p5
  let shown = groups.map((_, index) => index);
  let position = 0;

  const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));

  function tokenNode(id, logprob) {
    const probability = logprob === null ? 0 : Math.exp(logprob);
    const bin = EDGES.findIndex((edge) => probability >= edge);
    const token = data.vocabulary[id];
    const visible = token.replace(/\r?\n/g, "⏎\n");
    const span = node("span", "p" + (bin < 0 ? EDGES.length : bin) + (token === "" ? " special" : ""), visible || "∅");
    span.title = `token ${id} · probability ${probability.toPrecision(3)} · log-probability ${fixed(logprob, 3)}`;
    return span;
  }

  function rolloutNode(row) {
    const guide = row.source === "guide";
    const box = node("article", "rollout" + (row.displaced ? " displaced" : "") + (guide ? " of-guide" : ""));
    const meta = node("div", "meta");
    meta.append(node("strong", "", `slot ${row.slot}`));
    meta.append(node("span", "tag " + (row.correct ? "right" : "wrong"), row.correct ? "✓ correct" : "✗ wrong"));
    if (row.displaced) meta.append(node("span", "tag out", "displaced by the guide: no weight in the loss"));
    meta.append(node("span", "", `reward ${fixed(row.reward, 2)}`));
    meta.append(node("span", "", `advantage ${fixed(row.advantage, 3)}`));
    meta.append(node("span", "", row.finish === "stop" ? "ended by itself" : "cut at the limit"));
    if (row.entropy !== null) meta.append(node("span", "", `entropy ${row.entropy.toFixed(3)} nats`));
    if (guide) meta.append(node("span", "", `sampled by the policy of step ${row.behavior_step}`));
    const tokens = node("div", "tokens mono");
    row.ids.forEach((id, k) => tokens.append(tokenNode(id, row.logprobs[k])));
    box.append(meta, tokens, node("div", "meta", row.verdict));
    return box;
  }

  function option(select, value, text) {
    const element = node("option", "", text);
    element.value = value;
    select.append(element);
  }

  const place = (group) => `${group.leg} ${group.step}`;

  function fillSteps() {
    byId("step").replaceChildren();
    for (const key of new Set(shown.map((index) => place(groups[index])))) {
      const group = groups[shown.find((index) => place(groups[index]) === key)];
      option(byId("step"), key, `step ${group.step} · ${group.kind} ${group.leg}${group.main_line ? "" : " (off the main line)"}`);
    }
  }

  function fillPrompts(group) {
    byId("prompt").replaceChildren();
    shown.forEach((index, at) => {
      if (place(groups[index]) !== place(group)) return;
      const mark = groups[index].replaced ? " · guided" : "";
      option(byId("prompt"), at, `${groups[index].prompt_id} · ${groups[index].task}${mark}`);
    });
  }

  function show(next) {
    if (!shown.length) return;
    position = Math.min(Math.max(next, 0), shown.length - 1);
    const group = groups[shown[position]];
    byId("step").value = place(group);
    fillPrompts(group);
    byId("prompt").value = position;
    byId("previous").disabled = position === 0;
    byId("next").disabled = position === shown.length - 1;
    byId("place").textContent = `group ${position + 1} of ${shown.length}`;

    const prompt = data.prompts[group.prompt_id];
    byId("words").textContent = prompt.words;
    byId("prompt-meta").replaceChildren(
      node("span", "", `prompt ${group.prompt_id}`), node("span", "", `family ${group.task}`),
      node("span", "", `expected answer ${prompt.answer}`),
      node("span", "", `group accuracy before replacement ${fixed(group.group_accuracy, 3)}`));

    const policy = group.rows.filter((row) => row.source === "policy");
    const guide = group.rows.filter((row) => row.source === "guide");
    byId("policy").replaceChildren(...policy.map(rolloutNode));
    byId("guide").replaceChildren(...guide.map(rolloutNode));
    if (!guide.length) {
      byId("guide").append(node("p", "note", group.guided
        ? "No guide trajectory entered this group: it passed above the gate, or the guide had no verified answer."
        : "This leg has no guide: every rollout is the policy's own."));
    }
  }

  function filter() {
    const only = byId("only").checked;
    const current = groups[shown[position]];
    shown = groups.map((_, index) => index).filter((index) => !only || groups[index].replaced);
    fillSteps();
    show(Math.max(0, shown.findIndex((index) => groups[index] === current)));
  }

  function jump(direction) {
    const here = place(groups[shown[position]]);
    let next = position;
    while (shown[next] !== undefined && place(groups[shown[next]]) === here) next += direction;
    if (shown[next] !== undefined) show(next);
  }

  byId("previous").addEventListener("click", () => show(position - 1));
  byId("next").addEventListener("click", () => show(position + 1));
  byId("only").addEventListener("change", filter);
  byId("step").addEventListener("change", (event) =>
    show(shown.findIndex((index) => place(groups[index]) === event.target.value)));
  byId("prompt").addEventListener("change", (event) => show(Number(event.target.value)));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    if (event.shiftKey) jump(direction);
    else show(position + direction);
  });
  filter();
})();
