"use strict";
(() => {
  const NUMBER = 0, X = 1, Y = 2, PICKS = 3, TOKENS = 4;  // of an expert, in the data
  const ROWS = 20, MORE_ROWS = 100, LABEL_HEIGHT = 18, REACH = 14;
  const COVERED = 0.2;  // share of the map that all circles together would cover
  const data = JSON.parse(document.getElementById("experts-data").textContent);
  const experts = data.experts;  // in order of use
  const texts = experts.map((expert) => expert[TOKENS].join("\n").toLowerCase());
  const most = data.positions ? experts[0][PICKS] : 1;
  const total = data.positions ? experts.reduce((sum, expert) => sum + expert[PICKS], 0) : experts.length;

  const isNarrow = () => window.innerWidth < 600;
  const map = document.getElementById("map");
  const svg = map.querySelector("svg");
  const dots = svg.appendChild(svgElement("g", {})), names = svg.appendChild(svgElement("g", {}));
  const tip = document.getElementById("tip");
  const body = document.querySelector("#expert-table tbody");
  const more = document.getElementById("more");
  const filter = document.getElementById("expert-filter");
  let found = experts.map((_, place) => place);
  let wanted = "", rows = ROWS, current = -1, circles = [], spots = [];

  const used = (picks) => data.positions ? `${(100 * picks / data.positions).toFixed(2)} %` : "not measured";
  const make = (name, text) => Object.assign(document.createElement(name), { textContent: text });
  const isHit = (token) => wanted !== "" && token.toLowerCase().includes(wanted);

  function addTokens(element, tokens) {
    const shown = [...tokens.filter(isHit), ...tokens.filter((token) => !isHit(token))].slice(0, isNarrow() ? 5 : 10);
    for (const token of shown) {
      const text = make("bdi", token);
      text.classList.toggle("hit", isHit(token));
      element.append(text, " ");
    }
    if (tokens.length > shown.length) element.append(`and ${(tokens.length - shown.length).toLocaleString("en")} more`);
  }

  function addRow(number, use, tokens) {
    const row = body.insertRow();
    row.append(make("td", number), make("td", use), Object.assign(document.createElement("td"), { className: "tokens" }));
    addTokens(row.lastChild, tokens);
  }

  function fillTable() {
    body.replaceChildren();
    if (data.alwaysOn.length && (wanted === "" || data.alwaysOn.some(isHit))) addRow("always on", "100 %", data.alwaysOn);
    for (const place of found.slice(0, rows)) {
      const expert = experts[place];
      addRow(expert[NUMBER].toLocaleString("en"), used(expert[PICKS]), expert[TOKENS]);
    }
    more.hidden = found.length <= rows;
  }

  // The map

  function svgElement(name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  function drawMap() {
    const width = map.clientWidth, height = Math.round(Math.min(640, Math.max(360, width * 0.55)));
    const largest = Math.min(22, Math.sqrt(COVERED * width * height * most / (Math.PI * total)));
    const margin = largest + LABEL_HEIGHT;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    spots = experts.map((expert) => ({
      x: margin + expert[X] / 1000 * (width - 2 * margin),
      y: margin + (1 - expert[Y] / 1000) * (height - 2 * margin),
      r: data.positions ? 1.2 + largest * Math.sqrt(expert[PICKS] / most) : 1.2 + largest,
    }));
    circles = spots.map((spot) => svgElement("circle", { cx: spot.x.toFixed(1), cy: spot.y.toFixed(1), r: spot.r.toFixed(1) }));
    dots.replaceChildren(...circles);
    markFound();
  }

  function nameOf(tokens) {  // a word, if it has one
    const token = tokens.find(isHit) ?? tokens.find((one) => /\p{L}{3}/u.test(one)) ?? tokens[0];
    return token.replace(/^␣+(?=.)/u, "");
  }

  function labels() {
    const placed = [], made = [], width = map.clientWidth, room = isNarrow() ? 16 : 60;
    for (const place of found) {
      if (made.length === room) break;
      const token = nameOf(experts[place][TOKENS]);
      const spot = spots[place], half = 4 + 3.6 * Math.min(token.length, 16);
      const box = { left: spot.x - half, right: spot.x + half, top: spot.y - spot.r - LABEL_HEIGHT, bottom: spot.y - spot.r };
      const overlaps = (other) => box.left < other.right && box.right > other.left && box.top < other.bottom && box.bottom > other.top;
      if (box.left < 0 || box.right > width || box.top < 0 || placed.some(overlaps)) continue;
      placed.push(box);
      const label = svgElement("text", { x: spot.x.toFixed(1), y: (box.bottom - 4).toFixed(1), "text-anchor": "middle" });
      label.textContent = token.length > 16 ? `${token.slice(0, 15)}…` : token;
      made.push(label);
    }
    return made;
  }

  function markFound() {
    map.classList.toggle("filtered", wanted !== "");
    for (const hit of dots.querySelectorAll(".hit")) hit.classList.remove("hit");
    if (wanted !== "") for (const place of found) circles[place].classList.add("hit");
    names.replaceChildren(...labels());
  }

  function show(place) {
    circles[current]?.classList.remove("current");
    current = place;
    tip.hidden = place < 0;
    if (place < 0) return;
    const expert = experts[place], spot = spots[place];
    circles[place].classList.add("current");
    tip.replaceChildren(make("strong", `Expert ${expert[NUMBER].toLocaleString("en")}`));
    if (data.positions) tip.append(make("small", `picked at ${used(expert[PICKS])} of the positions`), document.createElement("br"));
    addTokens(tip, expert[TOKENS]);
    const left = Math.min(spot.x + 14, map.clientWidth - tip.offsetWidth - 6);
    const below = spot.y + 14 + tip.offsetHeight < map.clientHeight;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${Math.max(6, below ? spot.y + 14 : spot.y - 14 - tip.offsetHeight)}px`;
  }

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
    let nearest = -1, least = Infinity;
    for (const place of found) {
      const distance = Math.hypot(spots[place].x - x, spots[place].y - y) - spots[place].r;
      if (distance < Math.min(least, REACH)) [nearest, least] = [place, distance];
    }
    if (nearest !== current) show(nearest);
  });
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(-1);
    if (!step || !found.length) return;
    event.preventDefault();
    const next = found.indexOf(current) + step;
    show(found[(next + found.length) % found.length]);
  });

  filter.addEventListener("input", () => {
    wanted = filter.value.replaceAll(" ", "␣").toLowerCase();
    found = experts.map((_, place) => place).filter((place) => wanted === "" || texts[place].includes(wanted));
    rows = ROWS;
    show(-1);
    document.getElementById("expert-count").textContent =
      wanted === "" ? "" : `${found.length.toLocaleString("en")} of ${experts.length.toLocaleString("en")} experts`;
    fillTable();
    markFound();
  });
  more.addEventListener("click", () => {
    rows += MORE_ROWS;
    fillTable();
  });
  new ResizeObserver(() => {
    if (map.clientWidth !== svg.viewBox.baseVal.width) drawMap();
  }).observe(map);
  fillTable();
  drawMap();

  // The misses

  const misses = [...document.querySelectorAll(".misses li")];
  const moreMisses = document.getElementById("more-misses");
  if (!misses.length) return;
  const missFilter = document.getElementById("miss-filter");
  let shownMisses = ROWS;

  function showMisses() {
    const text = missFilter.value.toLowerCase();
    const hits = misses.filter((miss) => miss.textContent.replaceAll("␣", " ").toLowerCase().includes(text));
    const shown = new Set(hits.slice(0, shownMisses));
    for (const miss of misses) miss.hidden = !shown.has(miss);
    moreMisses.hidden = hits.length <= shownMisses;
    document.getElementById("miss-count").textContent = text === "" ? "" : `${hits.length} of ${misses.length}`;
  }

  missFilter.addEventListener("input", showMisses);
  moreMisses.addEventListener("click", () => {
    shownMisses = misses.length;
    showMisses();
  });
  showMisses();
})();
