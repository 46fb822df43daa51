// What the tests measure on a page.
globalThis.look = (() => {
  const shifts = { sum: 0, who: [], seen: PerformanceObserver.supportedEntryTypes.includes('layout-shift') };
  let aside = false; // while a picture is taken, for which the window grows
  const observer = new PerformanceObserver((list) => {
    for (const e of list.getEntries()) {
      if (e.hadRecentInput || aside) continue;
      shifts.sum += e.value;
      for (const s of e.sources || []) shifts.who.push(`${e.value.toFixed(4)} ${s.node?.nodeName} ${s.node?.id || ''} ${s.node?.className || ''}`);
    }
  });
  observer.observe({ type: 'layout-shift', buffered: true });
  const lookAside = async (on) => {
    if (!on) await new Promise((done) => setTimeout(done, 300));
    observer.takeRecords();
    aside = on;
  };

  // A colour as the browser computes it: rgb(1, 2, 3), rgba(…), or color(srgb 0.1 0.2 0.3 / 0.4).
  const parse = (text) => {
    const v = text.match(/[\d.]+/g).map(Number);
    if (text.startsWith('color(')) v.splice(0, 3, ...v.slice(0, 3).map((x) => 255 * x));
    return [v[0], v[1], v[2], v[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const behind = (e) => {
    const layers = [];
    for (let x = e; x; x = x.parentElement) {
      const c = parse(getComputedStyle(x).backgroundColor);
      if (c[3] > 0) layers.push(c);
      if (c[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };

  const faint = () => {
    const found = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let n = walker.nextNode(); n; n = walker.nextNode()) {
      const e = n.parentElement;
      if (!n.data.trim() || e.closest('.out, .skip, title, script, noscript, :disabled') || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      const style = getComputedStyle(e), inSVG = e instanceof SVGElement;
      // A text in the ring lies on the shares, of which each has its colour.
      const grounds = inSVG ? [...e.parentNode.querySelectorAll('path')].map((p) => parse(getComputedStyle(p).fill)) : [behind(e)];
      let alpha = 1;
      for (let x = e; x; x = x.parentElement) alpha *= Number(getComputedStyle(x).opacity);
      const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && Number(style.fontWeight) >= 700;
      for (const ground of grounds) {
        const color = parse(inSVG ? style.fill : style.color);
        const ratio = contrast(over([color[0], color[1], color[2], color[3] * alpha], ground), ground);
        if (ratio < (large ? 3 : 4.5)) found.add(`${ratio.toFixed(2)}:1 "${n.data.trim().slice(0, 40)}" in ${e.nodeName.toLowerCase()}.${e.getAttribute('class') || ''}`);
      }
    }
    // The colours of the nodes against what is behind them (1.4.11).
    const card = behind(document.querySelector('.card'));
    for (const e of document.querySelectorAll('.node')) {
      const ratio = contrast(parse(getComputedStyle(e).borderTopColor), card);
      if (ratio < 3) found.add(`${ratio.toFixed(2)}:1 the colour of ${e.querySelector('h3').textContent}`);
    }
    return [...found];
  };

  const wide = () => document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((e) => `${e.nodeName} ${e.id} ${e.getAttribute('class')}`);

  return { faint, wide, lookAside, shift: () => shifts };
})();
