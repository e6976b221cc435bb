"use strict";

// Pictures: the text that is pointed at is shown; else the one with keyboard focus, and else the one that was clicked.
for (const picture of document.querySelectorAll(".picture")) {
  const stage = picture.querySelector(".stage");
  const layers = [...picture.querySelectorAll(".layer")];
  const buttons = [...picture.querySelectorAll("button")];
  const said = picture.querySelector(".said");
  let pointed = null, kept = null, focused = null;

  const update = () => {
    const shown = pointed ?? focused ?? kept;
    stage.classList.toggle("shown", shown !== null);
    buttons.forEach((button, i) => {
      layers[i].hidden = i !== shown;
      button.classList.toggle("shown", i === shown);
      button.setAttribute("aria-pressed", String(i === kept));
    });
    said.textContent = shown === null ? "" : buttons[shown].dataset.said;
  };

  buttons.forEach((button, i) => {
    button.addEventListener("pointerenter", () => { pointed = i; update(); });
    button.addEventListener("pointerleave", () => { pointed = null; update(); });
    button.addEventListener("focus", () => { focused = button.matches(":focus-visible") ? i : null; update(); });
    button.addEventListener("blur", () => { focused = null; update(); });
    button.addEventListener("click", () => { kept = kept === i ? null : i; update(); });
    button.addEventListener("keydown", (event) => { if (event.key === "Escape") { kept = null; update(); } });
  });
}

// Curves: the values of the step that is pointed at.
const data = document.getElementById("data");
const panels = data === null ? [] : JSON.parse(data.textContent);
document.querySelectorAll(".panel").forEach((figure, number) => {
  const { first, last, lines } = panels[number];
  const svg = figure.querySelector("svg[role]");
  const cursor = svg.querySelector(".cursor");
  const grid = svg.querySelector(".grid");
  const [left, right] = ["x1", "x2"].map((name) => Number(grid.getAttribute(name)));
  const step = figure.querySelector(".step span");
  const values = figure.querySelectorAll(".legend .value");

  const show = (at) => {
    lines.forEach((points, i) => {
      const nearest = points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
      values[i].textContent = String(nearest[1]);
    });
    step.textContent = String(Math.round(at));
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const share = Math.min(Math.max((x - left) / (right - left), 0), 1);
    cursor.setAttribute("x1", String(left + share * (right - left)));
    cursor.setAttribute("x2", cursor.getAttribute("x1"));
    cursor.setAttribute("visibility", "visible");
    show(first + share * (last - first));
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    show(last);
  });
});
