// Opens every page of the site in a frame, as wide as a desk's screen and a phone's, and
// reports what a reader would stumble over. Driven by tools/browse_site.py.

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function opened(frame, page) {
  const loaded = new Promise((done) => { frame.onload = done; });
  frame.src = page;
  await loaded;
  const view = frame.contentWindow;
  await view.document.fonts.ready;
  await Promise.all(
    [...view.document.images].map((image) => {
      image.loading = "eager";
      return image.decode().catch(() => {});
    }),
  );
  await pause(100);
  return view;
}

// The element that sticks out farthest, for whoever has to mend it.
function widest(document) {
  const scrolls = (node) => node && node !== document.body
    && (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
  const right = (node) => node.getBoundingClientRect().right;
  const nodes = [...document.body.querySelectorAll("*")].filter((node) => !scrolls(node));
  const last = nodes.reduce((a, b) => (right(b) >= right(a) ? b : a), nodes[0]);
  return `${last.tagName}.${last.className}: ${last.textContent.trim().slice(0, 60)}`;
}

function found(view) {
  const { document } = view;
  const formulas = [...document.querySelectorAll("math")];
  const flat = formulas.filter((formula) => {
    const box = formula.getBoundingClientRect();
    const shown = formula.checkVisibility ? formula.checkVisibility() : true;
    return shown && (box.width === 0 || box.height === 0);
  });
  const root = document.documentElement;
  return {
    errors: view.noted ?? ["no note of errors was kept"],
    formulas: formulas.length,
    flat: flat.length + document.querySelectorAll("merror").length,
    raw: [...document.querySelectorAll(".math")].filter(
      (node) => node.textContent.includes("\\("),
    ).length,
    broken: [...document.images].filter((image) => image.naturalWidth === 0)
      .map((image) => image.src),
    overflow: root.scrollWidth - root.clientWidth,
    widest: widest(document),
    titled: document.title !== "" && document.querySelector("h1") !== null,
  };
}

async function searched(frame, word) {
  const view = await opened(frame, `/search.html?q=${encodeURIComponent(word)}`);
  for (let i = 0; i < 100; i++) {
    const links = [...view.document.querySelectorAll("#search-results li a")];
    if (links.length && view.document.querySelector("#search-results p")) {
      return { errors: view.noted, hits: links.map((link) => link.href) };
    }
    await pause(100);
  }
  return { errors: view.noted, hits: [] };
}

async function main(plan) {
  const frame = document.querySelector("iframe");
  const report = { pages: [], searches: [] };
  for (const width of plan.widths) {
    frame.style.width = `${width}px`;
    frame.style.height = "900px";
    for (const page of plan.pages) {
      const view = await opened(frame, `/${page}`);
      report.pages.push({ page, width, ...found(view) });
    }
  }
  for (const word of plan.words) {
    report.searches.push({ word, ...(await searched(frame, word)) });
  }
  return report;
}

fetch("/plan").then((answer) => answer.json()).then(main)
  .catch((error) => ({ failed: String(error.stack ?? error) }))
  .then((report) => fetch("/report", { method: "POST", body: JSON.stringify(report) }));
