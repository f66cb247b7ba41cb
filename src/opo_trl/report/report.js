"use strict";
// Texts of a run enter the page through textContent alone, so none of them can become markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const PER_PAGE = 96; // completions; a page ends with a complete group

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  // A sentence in which `code` stands between backticks.
  function sentence(text) {
    const parts = text.split("`").map((part, i) => (i % 2 ? element("code", "", part) : part));
    return element("span", "", ...parts);
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    return String(Number(Math.abs(value) < 100 ? value.toPrecision(3) : value.toFixed(1)));
  }

  // ---- Header, findings, notes

  data.facts.forEach(([name, value]) =>
    byId("facts").append(element("div", "", element("dt", "", name), element("dd", "", value))));
  const settings = Object.entries(data.settings);
  byId("settings").hidden = !settings.length;
  byId("settings").append(element("ul", "", ...settings.map(([name, value]) => element("li", "", `${name}: ${value}`))));

  function showButton(finding) {
    const button = element("button", "", "Show these completions");
    button.type = "button";
    button.addEventListener("click", () => { // the step and the search stay as they are chosen
      Object.assign(state, { filters: new Set([finding.filter]), page: 0 });
      showCompletions();
      byId("completions").scrollIntoView();
    });
    return button;
  }

  function cardOf(finding) {
    const card = element("div", "finding", element("strong", "", finding.title), sentence(`${finding.text} ${finding.advice}`));
    if (finding.examples.length) {
      const texts = finding.examples.map(([what, text]) =>
        [element("dt", "", what), element("dd", "text", text)]).flat();
      card.append(element("dl", "examples", ...texts));
    }
    if (finding.filter && FILTERS.some((filter) => filter.id === finding.filter))
      card.append(element("div", "", showButton(finding)));
    if (finding.consequences.length) {
      const list = finding.consequences.map((each) =>
        element("li", "", element("b", "", `${each.title}. `), sentence(each.text)));
      card.append(element("div", "follows", "Probably follows from this:", element("ul", "", ...list)));
    }
    return card;
  }

  function showFindings() {
    byId("findings").append(...data.findings.map(cardOf));
    if (!data.findings.length) byId("findings").append(element("p", "nothing", "Nothing stands out by the rules."));
    const rules = data.rules.map(([text, result]) =>
      element("li", "", element("span", `result ${result.split(":")[0].replace(" ", "-")}`, result), ` ${text}`));
    const count = (result) => data.rules.filter(([, each]) => each.startsWith(result)).length;
    const summary = `The ${data.rules.length} rules: ${count("found")} found something, ` +
      `${count("not found")} found nothing, ${count("not evaluated")} could not be evaluated`;
    byId("findings").append(element("details", "", element("summary", "", summary), element("ul", "", ...rules)));
    data.notes.forEach((note) => byId("notes").append(element("p", "note", sentence(note))));
  }

  // ---- Charts

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const drawn = [];

  const valuesOf = (chart) => chart.lines.flatMap(({ metric }) => data.metrics[metric].values);
  const largest = (chart) => Math.max(...valuesOf(chart).map(Math.abs));

  // Whether the curve hardly changes. From 0 on it then looks flat, where an axis cut to its range would show a rise.
  const isFlat = (chart) => {
    const least = Math.min(...valuesOf(chart));
    return least > 0 && least > 0.9 * largest(chart);
  };

  // A line at the step whose completions are shown.
  function chosenStep() {
    if (!state.step) return [];
    return [{ type: "line", x0: Number(state.step), x1: Number(state.step), yref: "paper", y0: 0, y1: 1,
      line: { color: style("muted"), width: 1.5, dash: "dot" } }];
  }

  function layout(chart) {
    const axis = { gridcolor: style("line"), zerolinecolor: style("line"), linecolor: style("line"), automargin: true };
    const limits = chart.fraction ? { autorangeoptions: { minallowed: -0.04, maxallowed: 1.04 } } : {};
    return {
      font: { color: style("text"), family: "system-ui, sans-serif", size: 12 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 14, t: chart.lines.length > 1 ? 30 : 10, b: 38 },
      xaxis: { ...axis, title: { text: "optimizer step", standoff: 6, font: { size: 11 } },
        unifiedhovertitle: { text: "step %{x}" }, exponentformat: "SI" },
      yaxis: { ...axis, title: { text: chart.unit, standoff: 6, font: { size: 11 } },
        exponentformat: largest(chart) >= 1000 ? "SI" : "e", rangemode: isFlat(chart) ? "tozero" : "normal", ...limits },
      barmode: "stack", bargap: 0.15,
      showlegend: chart.lines.length > 1,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 }, traceorder: "normal" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: style("card"), bordercolor: style("line"), font: { color: style("text") } },
      shapes: chosenStep(),
    };
  }

  function traces(chart) {
    return chart.lines.map(({ metric, label, color }) => {
      const { steps, values } = data.metrics[metric];
      const shade = style(color) || style("other");
      const shared = { x: steps, y: values, name: label, meta: metric };
      if (chart.stacked) return { ...shared, type: "bar", marker: { color: shade } };
      return { ...shared, type: "scatter", mode: steps.length > 60 ? "lines" : "lines+markers",
        line: { color: shade, width: 2 }, marker: { color: shade, size: 5 } };
    });
  }

  // What a metric is, shown under the pointer.
  function named(name, ...metrics) {
    const made = element("span", "metric", name);
    made.title = metrics.filter((metric) => metric in data.meanings)
      .map((metric) => `${metric}: ${data.meanings[metric]}`).join("\n");
    return made;
  }

  function draw(box, chart) {
    const options = { displaylogo: false, responsive: true, displayModeBar: false };
    const plot = element("div", "plot");
    const title = element("h3", "", named(chart.title, ...chart.lines.map(({ metric }) => metric)));
    box.append(title, plot);
    window.Plotly.newPlot(plot, traces(chart), layout(chart), options).then(() => {
      plot.on("plotly_click", (event) => showStep(event.points[0].x));
    });
    drawn.push([plot, chart]);
  }

  const markStep = () => drawn.forEach(([plot]) => window.Plotly.relayout(plot, { shapes: chosenStep() }));

  function constantOf(section) {
    const items = section.constant.flatMap((metric, i) =>
      [i ? ", " : "", named(metric, metric), ` ${number(data.metrics[metric].values[0])}`]);
    return element("p", "note constant", "Constant: ", ...items);
  }

  function showSection(section, collapsed, first) {
    const boxes = section.charts.map(() => element("div", "chart"));
    const parts = [element("div", "grid", ...boxes)];
    if (section.constant.length) parts.unshift(constantOf(section));
    if (first && data.absent.length) parts.unshift(element("p", "note", `No value in the log: ${data.absent.join(", ")}`));
    if (first && data.groups.length && section.charts.length)
      parts.unshift(element("p", "note", "Click a point of a curve to see the completions of that step."));
    const drawAll = () => section.charts.forEach((chart, i) => draw(boxes[i], chart));
    if (!collapsed) {
      byId("charts").append(element("section", "", element("h2", "", section.title), ...parts));
      drawAll();
      return;
    }
    const heading = element("h2", "", `${section.title} (${section.charts.length + section.constant.length})`);
    const details = element("details", "", element("summary", "", heading), ...parts);
    details.addEventListener("toggle", drawAll, { once: true }); // drawn when it is opened for the first time
    byId("charts").append(details);
  }

  function showStep(step) {
    const logged = [...new Set(data.groups.map((group) => group.step))];
    if (!logged.length) return;
    state.step = String(logged.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best)));
    state.page = 0;
    showCompletions();
    byId("completions").scrollIntoView();
  }

  // ---- Theme

  const THEME = "opo-trl report theme";

  // A browser can refuse storage, as some do for a file: the theme is then that of the system.
  function stored(theme) {
    try {
      if (theme) localStorage.setItem(THEME, theme);
      return localStorage.getItem(THEME);
    } catch {
      return null;
    }
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
    drawn.forEach(([box, chart]) => window.Plotly.react(box, traces(chart), layout(chart)));
  }

  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    stored(theme);
    setTheme(theme);
  });

  // ---- Completions

  // The reward by which filters judge: the trained one, which is the name of no function, or that of a function.
  function judged(row) {
    const place = data.functions.indexOf(data.judges[state.judge]);
    return place < 0 ? row.reward : row.rewards[place];
  }

  const FILTERS = [
    { id: "positive", label: "reward above 0", of: (group, row) => judged(row) > 0,
      help: "Completions with a reward above 0" },
    { id: "not_positive", label: "reward 0 or below", of: (group, row) => judged(row) !== null && judged(row) <= 0,
      help: "Completions with a reward of 0 or below" },
    { id: "none_positive", label: "groups without a reward above 0", of: (group) => group.none_positive[state.judge],
      help: "Groups in which no completion has a reward above 0" },
    { id: "all_equal", label: "groups with equal rewards", of: (group) => group.all_equal[state.judge],
      help: "Groups in which all completions have the same reward" },
    { id: "truncated", label: "truncated", of: (group, row) => row.truncated === true, shown: data.has.truncated,
      help: "Completions that stop without an end-of-sequence token" },
    { id: "no_answer", label: "no answer", of: (group, row) => row.no_answer, shown: data.has.verdict,
      help: "Completions in which math_verify_reward finds no boxed answer" },
    { id: "unscorable", label: "unscorable", of: (group, row) => row.unscorable,
      help: "Completions for which every reward function returned None" },
  ].filter((filter) => filter.shown !== false);

  const state = { step: "", split: "", judge: 0, filters: new Set(), query: "", page: 0 };
  let count = 0;
  data.groups.forEach((group) => group.rows.forEach((row) => { row.index = count++; }));

  const textOf = (messages) => messages.map(([, text]) => text).join("\n").toLowerCase();
  const selected = (group) =>
    (!state.step || group.step === Number(state.step)) && (!state.split || group.split === state.split);

  function found(group, row, query) {
    if (!query) return true;
    group.text ??= `${textOf(group.prompt)}\n${group.solution ?? ""}`.toLowerCase();
    row.text ??= `${textOf(row.messages)}\n${Object.values(row.extra).join("\n")}`.toLowerCase();
    return group.text.includes(query) || row.text.includes(query);
  }

  const passes = (group, row) => FILTERS.every((filter) => !state.filters.has(filter.id) || filter.of(group, row));

  // Groups with a completion of the chosen step that the search finds, each with those completions.
  function searched() {
    const query = state.query.trim().toLowerCase();
    return data.groups.filter(selected)
      .map((group) => [group, group.rows.filter((row) => found(group, row, query))])
      .filter(([, rows]) => rows.length);
  }

  // Those of them that pass all filters.
  function matching(groups) {
    return groups.map(([group, rows]) => [group, rows.filter((row) => passes(group, row))])
      .filter(([, rows]) => rows.length);
  }

  function pagesOf(found) {
    const pages = [];
    let rows = PER_PAGE;
    for (const each of found) {
      if (rows >= PER_PAGE) { pages.push([]); rows = 0; }
      pages[pages.length - 1].push(each);
      rows += each[1].length;
    }
    return pages;
  }

  function showFilters(groups) {
    const buttons = FILTERS.map((filter) => {
      let hits = 0;
      groups.forEach(([group, rows]) => rows.forEach((row) => { if (filter.of(group, row)) hits++; }));
      const button = element("button", "", `${filter.label} (${hits})`);
      button.type = "button";
      button.title = filter.help;
      button.dataset.filter = filter.id;
      button.setAttribute("aria-pressed", state.filters.has(filter.id));
      button.disabled = !hits && !state.filters.has(filter.id);
      button.addEventListener("click", () => {
        if (!state.filters.delete(filter.id)) state.filters.add(filter.id);
        state.page = 0;
        showCompletions();
        document.querySelector(`[data-filter=${filter.id}]`).focus(); // the buttons have been made anew
      });
      return button;
    });
    byId("filters").replaceChildren(...buttons);
  }

  function messagesOf(messages, row) {
    const box = element("div", "text");
    messages.forEach(([role, text], i) => {
      if (role) box.append(element("span", "role", role), "\n");
      box.append(text, i + 1 < messages.length ? "\n" : "");
    });
    if (row && row.logps && byId("colour").checked) {
      box.replaceChildren(...row.tokens.map((token, i) => {
        const span = element("span", "token", token);
        const logp = row.logps[i];
        if (logp !== null) {
          span.style.setProperty("--p", `${Math.min(70, -15.2 * logp)}%`); // 70 % at p = 0.01
          span.title = `log p = ${number(logp)}, p = ${number(Math.exp(logp))}`;
        }
        return span;
      }));
    }
    return box;
  }

  const baselinesOf = (group) => new Set(group.rows.map((row) => row.baseline).filter((value) => value !== null));
  const severalBaselines = data.groups.some((group) => baselinesOf(group).size > 1); // else the header has it

  const COLUMNS = [
    ...(data.has.reward || !data.functions.length ? [["reward", (row) => row.reward]] : []),
    ...(data.functions.length > 1 || !data.has.reward
      ? data.functions.map((name, i) => [name, (row) => row.rewards[i]]) : []),
    ...(severalBaselines ? [["b*", (row) => row.baseline]] : []),
    ...(data.has.advantage ? [["advantage", (row) => row.advantage]] : []),
    ...(data.has.length ? [["length", (row) => row.length]] : []),
  ];

  function cell(name, value) {
    const made = element("td", "number", number(value));
    if (name === "advantage" && value) made.classList.add(value > 0 ? "positive" : "negative");
    return made;
  }

  function rowOf(row) {
    const made = element("tr", "", ...COLUMNS.map(([name, of]) => cell(name, of(row))));
    made.dataset.row = row.index;
    const text = element("td", "wide", messagesOf(row.messages, row));
    if (row.truncated) text.append(element("span", "badge", "truncated"));
    if (row.unscorable) text.append(" ", element("span", "badge", "unscorable"));
    made.append(text, ...data.extras.map((name) => element("td", "extra", row.extra[name] ?? "")));
    return made;
  }

  function groupOf([group, rows]) {
    const header = element("header", "", element("b", "", `step ${group.step}`));
    const say = (text) => header.append(element("span", "", text));
    if (group.split) say(group.split === "eval" ? "held-out" : "training");
    const scores = group.rows.map((row) => row.reward).filter((value) => value !== null);
    if (scores.length) say(`mean reward ${number(scores.reduce((a, b) => a + b, 0) / scores.length)}`);
    const baselines = baselinesOf(group);
    if (baselines.size === 1) say(`b* ${number([...baselines][0])}`);
    say(rows.length === group.rows.length
      ? `${rows.length} completion${rows.length === 1 ? "" : "s"}`
      : `${rows.length} of ${group.rows.length} completions`);
    if (group.none_positive[state.judge]) header.append(element("span", "badge", "no reward above 0"));
    if (group.all_equal[state.judge]) header.append(element("span", "badge", "all equal"));
    const heads = COLUMNS.map(([name]) => element("th", "number", name));
    heads.push(element("th", "", "completion"), ...data.extras.map((name) => element("th", "", name)));
    const table = element("table", "", element("thead", "", element("tr", "", ...heads)),
      element("tbody", "", ...rows.map(rowOf)));
    const prompt = element("div", "prompt", messagesOf(group.prompt));
    if (group.solution !== null)
      prompt.append(element("div", "solution", element("span", "role", "solution"), " ", group.solution));
    return element("article", "group", header, prompt, element("div", "scroll", table));
  }

  const START = { step: "", split: "", query: "", page: 0 };

  function reset() {
    Object.assign(state, START, { filters: new Set() });
    showCompletions();
  }

  let marked = "";

  function showCompletions() {
    const candidates = searched();
    const found = matching(candidates);
    const pages = pagesOf(found);
    state.page = Math.max(0, Math.min(state.page, pages.length - 1));
    byId("step").value = state.step;
    byId("split").value = state.split;
    byId("query").value = state.query;
    showFilters(candidates);
    if (state.step !== marked) markStep();
    marked = state.step;
    const isRestricted = Boolean(state.step || state.split || state.query || state.filters.size);
    document.querySelectorAll(".reset").forEach((button) => { button.disabled = !isRestricted; });
    byId("nothing-found").hidden = found.length > 0;
    byId("groups").replaceChildren(...(pages[state.page] ?? []).map(groupOf));
    const rows = found.reduce((total, each) => total + each[1].length, 0);
    byId("shown").textContent =
      `${rows} completions in ${found.length} groups, page ${pages.length ? state.page + 1 : 0} of ${pages.length}`;
    document.querySelectorAll(".previous").forEach((button) => { button.disabled = state.page === 0; });
    document.querySelectorAll(".next").forEach((button) => { button.disabled = state.page + 1 >= pages.length; });
  }

  function options(id, values, all) {
    byId(id).replaceChildren(...(all ? [new Option(all, "")] : []), ...values.map(([text, value]) =>
      new Option(text, value)));
  }

  function listen(id, name, read) {
    byId(id).addEventListener("input", (event) => {
      state[name] = read(event.target);
      state.page = 0;
      showCompletions();
    });
  }

  function startCompletions() {
    if (!data.groups.length) return;
    byId("completions").hidden = false;
    const steps = [...new Set(data.groups.map((group) => group.step))];
    options("step", steps.map((step) => [step, step]), "all");
    const splits = [...new Set(data.groups.map((group) => group.split).filter(Boolean))];
    options("split", splits.map((split) => [split === "eval" ? "held-out" : "training", split]), "all");
    options("judge", data.judges.map((name, i) => [name, i]));
    byId("split-label").hidden = splits.length < 2;
    byId("judge-label").hidden = data.judges.length < 2;
    byId("colour-label").hidden = byId("scale").hidden = !data.has.logps;
    listen("step", "step", (target) => target.value);
    listen("split", "split", (target) => target.value);
    listen("judge", "judge", (target) => Number(target.value));
    listen("query", "query", (target) => target.value);
    byId("colour").addEventListener("input", showCompletions);
    const turn = (selector, by) => document.querySelectorAll(selector).forEach((button) =>
      button.addEventListener("click", () => {
        state.page += by;
        showCompletions();
        byId("completions").scrollIntoView();
      }));
    document.querySelectorAll(".reset").forEach((button) => button.addEventListener("click", reset));
    turn(".previous", -1);
    turn(".next", 1);
    showCompletions();
  }

  setTheme(stored() || (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  showFindings();
  startCompletions();
  data.sections.forEach((section, i) => showSection(section, section.title === "All other metrics", i === 0));
  document.documentElement.dataset.ready = "true";
})();
