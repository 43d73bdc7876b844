// Examines the page in every frame and writes what it found, as JSON, into #found.
"use strict";

const channels = (colour) => {
  const [r, g, b, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
  return { rgb: [r, g, b], alpha };
};

const luminance = (rgb) => {
  const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};

const contrast = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};

// The colour behind an element: that of the nearest ancestor which has one.
const ground = (element, view) => {
  for (let at = element; at; at = at.parentElement) {
    const { rgb, alpha } = channels(view.getComputedStyle(at).backgroundColor);
    if (alpha === 1) return rgb;
  }
  return [255, 255, 255];
};

// A picture's elements in the place of the image that it is, so that what it holds can be looked at.
const unfold = (image, page, view) => {
  const bytes = Uint8Array.from(atob(image.src.split(",")[1]), (letter) => letter.charCodeAt(0));
  const parsed = new view.DOMParser().parseFromString(new TextDecoder().decode(bytes), "image/svg+xml");
  const svg = page.importNode(parsed.documentElement, true), width = image.getBoundingClientRect().width;
  for (const size of ["width", "height"]) svg.removeAttribute(size);
  svg.style.cssText = `display: block; width: ${width}px; height: auto`;
  image.replaceWith(svg);
};

const examine = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const found = {
    width: view.innerWidth, scheme: view.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light",
    title: page.title, scrollWidth: root.scrollWidth, clientWidth: root.clientWidth, height: root.scrollHeight,
    ground: ground(page.body, view), sticksOut: [], faint: [], small: [], leastContrast: 99, leastLetters: 99, texts: 0,
    scrolling: [], ids: [...page.querySelectorAll("[id]")].map((e) => e.id),
    headings: [...page.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((e) => e.tagName),
    pictures: [...page.querySelectorAll("img")].map((image) => ({
      name: image.alt, loaded: image.complete && image.naturalWidth > 0,
      width: image.getBoundingClientRect().width, shown: (image.closest(".scroll") ?? root).clientWidth,
    })),
    requests: view.performance.getEntriesByType("resource").map((e) => e.name), scripts: page.scripts.length,
  };
  for (const box of page.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) found.scrolling.push(box.firstElementChild.tagName);
  }
  for (const image of page.querySelectorAll('img[src^="data:image/svg+xml;base64,"]')) unfold(image, page, view);
  const goal = (use) => (use.getAttribute("href") ?? use.getAttribute("xlink:href")).slice(1);
  found.dangling = [...page.querySelectorAll("svg use")].filter((e) => !e.closest("svg").querySelector(`[id="${goal(e)}"]`)).length;
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, said = texts.currentNode.data.trim();
    if (!said || element.closest("title, style, script")) continue;
    found.texts += 1;
    const style = view.getComputedStyle(element), inPicture = element.closest("svg");
    const ratio = contrast(channels(inPicture ? style.fill : style.color).rgb, ground(element, view));
    found.leastContrast = Math.min(found.leastContrast, ratio);
    if (ratio < 4.5) found.faint.push(said);
    const scale = inPicture ? Math.abs(inPicture.getScreenCTM().a) : 1;
    const letters = parseFloat(style.fontSize) * scale;
    found.leastLetters = Math.min(found.leastLetters, letters);
    if (letters < 8.5) found.small.push(said);
  }
  for (const element of page.body.querySelectorAll(":not(.scroll *)")) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > root.clientWidth + 0.5 || box.left < -0.5)) found.sticksOut.push(element.outerHTML.slice(0, 80));
  }
  for (const svg of page.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.sticksOut.push("in a picture: " + text.textContent);
    }
  }
  return found;
};

window.addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(examine));
});
