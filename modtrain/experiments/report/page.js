"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = new Map();
  const config = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], plotlyServerURL: "" };

  // The colours of the page, which follow the reader's light or dark theme.
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const [text, ground, faint] = ["--text", "--ground", "--faint"].map((name) => style.getPropertyValue(name).trim());
    const result = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, size: 12, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: ground, bordercolor: faint, font: { color: text }, align: "left" } };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        result[name] = { gridcolor: faint, zerolinecolor: faint, linecolor: faint, ...layout[name] };
      }
    }
    return result;
  }

  function withView(figure) {
    const { spec, view, choice } = figure;
    const layout = themed(spec.layout);
    let data = spec.choices ? spec.choices[choice].data : spec.data;
    if (spec.views) {
      const { x, y, label, scale } = spec.views[view];
      data = data.map((trace, place) => ({ ...trace, x: x[place], ...(y ? { y: y[place] } : {}) }));
      layout.xaxis = { ...layout.xaxis, title: { text: label }, type: scale, exponentformat: "SI" };
    }
    return [data, layout];
  }

  function draw(key) {
    const [data, layout] = withView(shown.get(key));
    return Plotly.react(document.getElementById(key), data, layout, config);
  }

  for (const [key, spec] of Object.entries(specs)) {
    shown.set(key, { spec, view: 0, choice: 0 });
  }
  document.querySelectorAll("[data-view]").forEach((button) => {
    button.addEventListener("click", () => {
      shown.get(button.dataset.figure).view = Number(button.dataset.view);
      button.parentElement.querySelectorAll("button").forEach((other) =>
        other.setAttribute("aria-pressed", String(other === button)));
      draw(button.dataset.figure);
    });
  });
  document.querySelectorAll("select[data-figure]").forEach((select) => {
    select.addEventListener("change", () => {
      shown.get(select.dataset.figure).choice = Number(select.value);
      draw(select.dataset.figure);
    });
  });

  // A click on a heading sorts by the column; numbers by their full values.
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("th button").forEach((button) => {
      button.addEventListener("click", () => {
        const heading = button.parentElement, body = table.tBodies[0];
        const place = [...heading.parentElement.children].indexOf(heading);
        const up = heading.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => row.children[place].dataset.value;
        const compare = (a, b) => {
          const [one, two] = [value(a), value(b)];
          if (one === "" || two === "") return (one === "") - (two === "");
          const by = Number(one) - Number(two);
          return (up ? 1 : -1) * (Number.isNaN(by) ? one.localeCompare(two) : by);
        };
        body.append(...[...body.rows].sort(compare));
      });
    });
  });

  // One figure after the other: the page answers meanwhile.
  const drawAll = async () => {
    for (const key of shown.keys()) {
      await draw(key);
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  };
  dark.addEventListener("change", drawAll);
  drawAll();
})();
