// The dashboard: everything comes by one stream of GET /v1/live (docs/openapi.yaml),
// and nothing of it becomes markup.

const patience = 2500; // ms without a message, of which two come in a second
const span = 120; // seconds of the graphs
const newsFor = 20; // seconds that something is the headline
const buckets = 1024;
const svgNS = 'http://www.w3.org/2000/svg';

const $ = (id) => document.getElementById(id);

// make gives an element; attributes with a value of null are left out.
function make(tag, attributes = {}, ...children) {
  const e = tag.startsWith('svg:') ? document.createElementNS(svgNS, tag.slice(4)) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) if (v !== null) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

// set changes a text only if it is another, so that nothing is read out twice.
function set(e, text) { if (e.textContent !== text) e.textContent = text; }
function attr(e, name, value) { if (e.getAttribute(name) !== value) e.setAttribute(name, value); }

const nodes = new Map(); // by wire MAC: what is known of each
let live = null; // the last message
let owners = null; // the map, its owners by wire MAC
let move = null; // the last change of the map: who gave how many buckets to whom
const happened = []; // the newest first, those that several nodes saw once
const known = new Set(); // of the events
const history = []; // of the graphs

function node(id) {
  let n = nodes.get(id);
  if (!n) {
    // Each further eight have the same colours, lighter and hatched.
    const again = Math.min(2, Math.floor(nodes.size / 8));
    n = { id, color: 'o' + (nodes.size % 8) + (again ? ' again' + again : ''), again, rate: 0, measured: false, rates: {}, totals: {}, flows: 0 };
    nodes.set(id, n);
  }
  return n;
}

// called is what a person calls a node: its host's name, and the end of its wire MAC
// where several have the same.
function called(id) {
  const name = nodes.get(id)?.name;
  if (!name) return id;
  for (const n of nodes.values()) if (n.id !== id && n.name === name) return name + ' ' + id.slice(-5);
  return name;
}

const names = (ids) => list(ids.map(called).sort());
const gone = (n) => !!n.now?.gone;

function list(texts) {
  return texts.length < 2 ? texts.join('') : texts.slice(0, -1).join(', ') + ' and ' + texts.at(-1);
}

function number(v) {
  if (v >= 1e6) return (v / 1e6).toFixed(1) + ' M';
  if (v >= 1e4) return Math.round(v / 1e3) + ' k';
  return String(v >= 10 ? Math.round(v) : Math.round(10 * v) / 10);
}

function duration(s) {
  if (s < 60) return Math.floor(s) + ' s';
  if (s < 3600) return Math.floor(s / 60) + ' min';
  if (s < 86400) return Math.floor(s / 3600) + ' h ' + Math.floor(s % 3600 / 60) + ' min';
  return Math.floor(s / 86400) + ' d ' + Math.floor(s % 86400 / 3600) + ' h';
}

const one = (count, word) => count + ' ' + word + (count === 1 ? '' : 's');

// ---- what comes

let source = null;
let heardAt = performance.now();
let again = 0;
let trouble = '';
let limit = '';

function connect() {
  clearTimeout(again);
  source?.close();
  heardAt = performance.now();
  source = new EventSource('../v1/live?follow=1');
  source.addEventListener('live', (e) => {
    heardAt = performance.now();
    trouble = '';
    take(JSON.parse(e.data));
  });
  // A local proxy says what it lets through, and why there is nothing.
  source.addEventListener('limit', (e) => { limit = JSON.parse(e.data).role; });
  source.addEventListener('problem', (e) => { trouble = JSON.parse(e.data).error; showLink(); });
  source.onerror = () => {
    source.close();
    clearTimeout(again);
    again = setTimeout(connect, 700);
    showLink();
  };
}

// A node that loses its power does not say good-bye: the next connection leads to
// another one.
setInterval(() => {
  if (document.hidden) return;
  if (performance.now() - heardAt > patience) connect();
  showLink();
}, 500);

document.addEventListener('visibilitychange', () => {
  if (document.hidden) { source?.close(); clearTimeout(again); } else connect();
});

function showLink() {
  const lost = performance.now() - heardAt > 1500 || !!trouble || !live;
  document.body.classList.toggle('lost', lost);
  set($('linktext'), !lost ? 'live, from ' + called(live.asked) : trouble && !live ? trouble : live ? 'no answer; trying again' : 'connecting…');
}

function take(l) {
  const first = live === null;
  live = l;
  const now = Date.parse(l.time);
  for (const x of l.nodes) {
    const n = node(x.node);
    n.now = x;
    n.name = x.name || n.name;
    if (x.gone) { n.rate = 0; n.rates = {}; n.flows = 0; n.base = null; continue; }
    n.flows = x.flows;
    if (x.said) hear(n, x.said);
    if (x.boot) n.boot = x.boot;
  }
  for (const n of nodes.values()) {
    if (!l.nodes.some((x) => x.node === n.id)) { n.now = null; n.rate = 0; n.rates = {}; n.flows = 0; }
  }
  if (l.owners) takeOwners(l.owners, now);
  const fresh = (l.events || []).filter(takeEvent);
  // A rate takes two looks; before that the graphs would show a jump.
  if (history.length || l.nodes.every((x) => x.gone || x.error || node(x.node).measured)) history.push({ t: now, rate: sample('rate'), flows: sample('flows') });
  while (history.length && history[0].t < now - (span + 5) * 1000) history.shift();
  if (first) $('main').hidden = false;
  show(now, fresh.length > 0, first);
}

function sample(what) {
  const s = {};
  for (const n of nodes.values()) s[n.id] = n[what];
  return s;
}

// hear takes what a node says of itself; rates are by its own clock.
function hear(n, said) {
  n.said = said;
  n.totals = said.verdicts || {};
  const base = n.base;
  if (base && said.uptime_seconds >= base.uptime_seconds) {
    const dt = said.uptime_seconds - base.uptime_seconds;
    if (dt < 0.9) return;
    n.rates = {};
    for (const [v, count] of Object.entries(n.totals)) n.rates[v] = Math.max(0, count - (base.verdicts[v] || 0)) / dt;
    n.rate = n.rates['accept-new'] || 0;
    n.measured = true;
  }
  n.base = { uptime_seconds: said.uptime_seconds, verdicts: n.totals };
}

function takeOwners(o, now) {
  const bytes = Uint8Array.from(atob(o.buckets), (c) => c.charCodeAt(0));
  const next = Array.from(bytes, (i) => o.nodes[i] || '');
  const before = owners;
  owners = next;
  if (!before) return;
  const m = { at: now, gave: {}, took: {}, changed: new Set() };
  next.forEach((to, i) => {
    const from = before[i];
    if (from === to) return;
    m.changed.add(i);
    (m.gave[from] ??= {})[to] = (m.gave[from][to] || 0) + 1;
    (m.took[to] ??= {})[from] = (m.took[to][from] || 0) + 1;
  });
  if (m.changed.size) move = m;
}

const grades = {
  bad: ['lost', 'all-failed', 'silent', 'fenced', 'one-way', 'yielded', 'unwell'],
  warn: ['left', 'restarts', 'drain', 'fail-open', 'refused', 'stopping', 'carrier', 'finding'],
  ok: ['joined', 'resume', 'well', 'recovered', 'unfenced', 'started', 'cleared'],
};
const gradeOf = (kind) => Object.keys(grades).find((g) => grades[g].includes(kind)) || 'info';

// takeEvent notes an event. What several nodes saw within three seconds is one.
function takeEvent(e) {
  const key = [e.node, e.time, e.kind, e.text].join('|');
  if (known.has(key)) return false;
  known.add(key);
  const at = Date.parse(e.time);
  const same = happened.find((h) => h.kind === e.kind && h.text === e.text && h.about === (e.about || '') && Math.abs(h.at - at) < 3000 && !h.by.includes(e.node) && !(e.text.startsWith('this node')));
  if (same) {
    same.by.push(e.node);
    if (e.why && (!same.why || same.why.startsWith('made by'))) same.why = e.why;
    return true;
  }
  const i = happened.findIndex((h) => h.at <= at);
  happened.splice(i < 0 ? happened.length : i, 0, { at, kind: e.kind, text: e.text, why: e.why || '', about: e.about || '', by: [e.node] });
  if (happened.length > 300) happened.length = 300;
  if (known.size > 5000) known.clear();
  return true;
}

// words says an event for somebody who looks from outside: nodes by their names.
function words(text, by) {
  return text.replace(/\S+ \(((?:[0-9a-f]{2}:){5}[0-9a-f]{2})\)/g, (_, id) => called(id))
    .replace(/([0-9a-f]{2}:){5}[0-9a-f]{2}/g, (id) => called(id))
    .replace(/\bthis node\b/g, names(by));
}

// sentence is words of an event or a finding, with the node that says it if it names none.
function sentence(h) {
  const text = words(h.text, h.by);
  return h.by.length > 1 || [...nodes.values()].some((n) => text.includes(called(n.id))) ? text : names(h.by) + ': ' + text;
}

// ---- what is shown

function show(now, news, first) {
  set($('cluster'), live.cluster);
  document.title = live.cluster + ' – clonecluster';
  set($('facts'), `${list(live.vip || [])} at ${live.clone_mac} · policy ${live.policy} · map ${live.map}, ` + (live.agreed ? 'agreed' : 'not agreed by all yet'));
  showLink();
  showHeadline(now);
  showRing(now);
  showNodes();
  graph($('g-new'), 'rate', now, 'newly accepted per second: connections, UDP datagrams and pings');
  graph($('g-flows'), 'flows', now, 'established connections');
  if (news || first) showEvents(first);
  showFindings();
  showVerdicts();
  showBoots();
}

function headline(now) {
  const all = live.nodes.map((x) => nodes.get(x.node));
  const here = all.filter((n) => !gone(n));
  const serving = here.filter((n) => n.now.state === 'serving' && n.now.live);
  const recent = happened.find((h) => now - h.at < newsFor * 1000 && ['lost', 'left', 'restarts', 'joined', 'drain', 'resume', 'unwell', 'well'].includes(h.kind) &&
    !(h.kind === 'joined' && (all.every((n) => n.said === undefined || n.said.uptime_seconds < newsFor) || !here.some((n) => n.id === h.about))) &&
    !(h.kind === 'well' && happened.some((j) => j.kind === 'joined' && j.about === h.about && now - j.at < newsFor * 1000)) &&
    !(['lost', 'left', 'restarts'].includes(h.kind) && here.some((n) => n.id === h.about)));
  const given = (counts) => list(Object.entries(counts || {}).map(([id, c]) => `${called(id) || 'nobody'} (${c})`).sort());
  if (live.fail_open) return ['bad', 'The services of all nodes fail their checks', 'The cluster serves on, since that may be better than nothing.'];
  if (recent) {
    const name = called(recent.about);
    const moved = move && move.at >= recent.at - 2000;
    switch (recent.kind) {
      case 'lost': case 'left': case 'restarts': {
        const what = { lost: ' has failed', left: ' has left', restarts: ' restarts its engine' }[recent.kind];
        const to = moved && move.gave[recent.about];
        return [recent.kind === 'lost' ? 'bad' : 'warn', name + what, (recent.why ? words(recent.why, recent.by) + '. ' : '') + (to ? `Its buckets are with ${given(to)} now.` : 'Its buckets go to the others.')];
      }
      case 'joined': {
        const from = moved && move.took[recent.about];
        return ['ok', name + ' is here', from ? `It takes new connections in buckets of ${given(from)}. What is established stays where it is.` : 'It listens first, and then takes its share.'];
      }
      case 'drain':
        return ['warn', name + ' is drained', `${words(recent.why, recent.by)}. It takes nothing new; its connections go on until they end.`];
      case 'resume': return ['ok', name + ' takes part again', words(recent.why, recent.by) + '.'];
      case 'unwell': return ['bad', 'A service of ' + name + ' fails its check', words(recent.why, recent.by) + '.'];
      case 'well': return ['ok', 'All services of ' + name + ' pass their checks', ''];
    }
  }
  const off = all.filter(gone), draining = here.filter((n) => n.now.state !== 'serving'), unwell = here.filter((n) => n.now.unwell), fenced = here.filter((n) => n.said?.fenced);
  const those = (some) => names(some.map((n) => n.id));
  if (unwell.length) return ['bad', `${serving.length} of ${all.length} nodes serve`, `Services fail on ${those(unwell)}.`];
  if (fenced.length) return ['bad', `${those(fenced)} takes no new connections`, 'Another node may not know of it: does a cable work one way?'];
  const found = here.flatMap((n) => (n.said?.findings || []).map((f) => ({ n, ...f })));
  const critical = found.filter((f) => f.level === 'critical'), directed = found.find((f) => f.code === 'directed-mode');
  const tell = (f) => sentence({ text: f.what, by: [f.n.id] }) + '.';
  if (critical.length) return ['bad', `${serving.length} of ${all.length} nodes serve, but: ${list([...new Set(critical.map((f) => f.code))])}`, tell(critical[0])];
  if (off.length) return ['warn', `${serving.length} of ${all.length} nodes serve`, `${those(off)}: gone. The others have its share.`];
  if (draining.length) return ['warn', `${serving.length} of ${all.length} nodes serve`, list(draining.map((n) => `${called(n.id)} is ${n.now.state}`)) + '.'];
  if (!live.agreed) return ['warn', 'The nodes agree on a new map', 'Until then nobody takes new connections in the buckets that move.'];
  if (directed && serving.length > 1) return ['ok', `All ${serving.length} nodes serve, in directed mode`, tell(directed)];
  const each = serving.map((n) => n.now.buckets);
  const share = Math.max(...each) - Math.min(...each) < 3 ? `Each takes ${one(Math.round(buckets / each.length), 'bucket')} of ${buckets}.` : 'Their shares differ, by weight or load.';
  return ['ok', serving.length === 1 ? 'One node serves, alone' : `All ${serving.length} nodes serve`, serving.length === 1 ? 'If it fails, nobody answers.' : share];
}

function showHeadline(now) {
  const [grade, head, text] = headline(now);
  const detail = text.charAt(0).toUpperCase() + text.slice(1);
  attr($('now'), 'class', grade);
  set($('headline'), head + '.');
  set($('detail'), detail);
}

// -- the ring

const ring = $('ring');
const arcs = [];
const shares = make('svg:g');
const rest = $('hover').textContent;

function wedge(r0, r1, a0, a1) {
  const p = (r, a) => `${(r * Math.sin(a)).toFixed(2)} ${(-r * Math.cos(a)).toFixed(2)}`;
  const big = a1 - a0 > Math.PI ? 1 : 0;
  if (a1 - a0 > 2 * Math.PI - 1e-6) return wedge(r0, r1, a0, a0 + Math.PI) + wedge(r0, r1, a0 + Math.PI, a0 + 2 * Math.PI - 1e-5);
  return `M${p(r1, a0)}A${r1} ${r1} 0 ${big} 1 ${p(r1, a1)}L${p(r0, a1)}A${r0} ${r0} 0 ${big} 0 ${p(r0, a0)}Z`;
}

for (let i = 0; i < buckets; i++) {
  const a = i / buckets * 2 * Math.PI;
  arcs.push(ring.appendChild(make('svg:path', { class: 'b nobody', d: wedge(126, 158, a, a + 2 * Math.PI / buckets) })));
}
for (const again of [1, 2]) {
  ring.append(make('svg:pattern', { id: 'hatch' + again, width: 9 / again, height: 9 / again, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' },
    make('svg:rect', { width: 4.5 / again, height: 9 / again })));
}
ring.append(shares);

let drawn = '';
function showRing(now) {
  let flows = 0, rate = 0;
  for (const n of nodes.values()) { flows += n.flows; rate += n.rate; }
  set($('flows'), number(flows));
  set($('rate'), number(rate));
  if (!owners) return;
  const moved = move && now - move.at < 6000 ? move.changed : null;
  for (let i = 0; i < buckets; i++) {
    const c = 'b ' + (owners[i] ? node(owners[i]).color : 'nobody') + (moved?.has(i) ? ' moved' : '');
    if (arcs[i].getAttribute('class') !== c) arcs[i].setAttribute('class', c);
  }
  const count = new Map();
  for (const o of owners) count.set(o, (count.get(o) || 0) + 1);
  const sorted = [...count].sort((a, b) => a[0] < b[0] ? -1 : 1);
  const text = 'Buckets by owner: ' + sorted.map(([id, c]) => `${id ? called(id) : 'nobody'} ${c}`).join(', ');
  if (text === drawn) return;
  drawn = text;
  set($('ringname'), text);
  shares.replaceChildren();
  let a = 0;
  for (const [id, c] of sorted) {
    const to = a + c / buckets * 2 * Math.PI, gap = sorted.length > 1 ? 0.012 : 0;
    const color = id ? node(id).color : 'nobody', d = wedge(84, 120, a + gap, Math.max(to - gap, a + gap + 1e-3));
    shares.append(make('svg:path', { class: color, d }, make('svg:title', {}, `${id ? called(id) : 'nobody'}: ${one(c, 'bucket')}, ${Math.round(100 * c / buckets)} %`)));
    if (id && node(id).again) shares.append(make('svg:path', { class: 'hatch', d, fill: `url(#hatch${node(id).again})` }));
    if (c / buckets > 0.09) {
      const mid = (a + to) / 2;
      shares.append(make('svg:text', { class: color, x: 102 * Math.sin(mid), y: -102 * Math.cos(mid), 'aria-hidden': 'true' }, Math.round(100 * c / buckets) + ' %'));
    }
    a = to;
  }
}

ring.addEventListener('pointermove', (e) => {
  const box = ring.getBoundingClientRect();
  const x = e.clientX - box.left - box.width / 2, y = e.clientY - box.top - box.height / 2;
  const i = Math.floor(((Math.atan2(x, -y) / 2 / Math.PI + 1) % 1) * buckets);
  if (owners) set($('hover'), `Bucket ${i} belongs to ${owners[i] ? called(owners[i]) : 'nobody'}: a new connection that falls into it is answered by that node.`);
});
ring.addEventListener('pointerleave', () => set($('hover'), rest));

// -- the nodes

function nodeCard(n) {
  const part = {};
  const bar = (key, name) => make('div', { class: 'meter ' + key }, make('div', {}, make('span', {}, name), part[key] = make('span')),
    make('i', { 'aria-hidden': 'true' }, part[key + 'bar'] = make('span')));
  const figure = (key, name) => make('div', {}, part[key] = make('b', {}, '0'), name);
  part.card = make('li', { class: 'node ' + n.color },
    make('div', { class: 'top' }, part.name = make('h3'), part.state = make('span', { class: 'state' })),
    bar('share', 'share'), bar('busy', 'busy'),
    make('div', { class: 'nums' }, figure('flows', 'connections'), figure('rate', 'new/s')),
    make('svg:svg', { class: 'spark', viewBox: '0 0 100 30', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, part.spark = make('svg:path')),
    part.health = make('p', { class: 'health' }), part.path = make('p', { class: 'small' }), part.place = make('p', { class: 'small' }));
  if (live.role !== 'read-only' && limit !== 'read-only') {
    part.act = make('button', { type: 'button' }, 'Drain…');
    part.act.addEventListener('click', () => ask(n));
    part.card.append(part.act);
  }
  return part;
}

function health(n) {
  const s = n.said;
  if (gone(n)) return ['bad', 'gone ' + n.now.gone];
  if (n.now.error) return ['warn', 'It says nothing: ' + n.now.error];
  if (!n.now.live) return ['warn', 'It is heard, and does not hear the node that is asked.'];
  if (s?.unwell?.length) return ['bad', s.unwell.join('; ')];
  if (n.now.unwell) return ['bad', 'A service fails its check.'];
  if (s?.fenced) return ['bad', 'Takes no new connections: another node may not know of it.'];
  if (s?.drain?.draining) return ['warn', s.drain.owned ? 'Waits for the others to take its buckets.' : s.drain.flows ? `Takes nothing new; ${one(s.drain.flows, 'connection')} to go.` : 'Drained: nothing is left here.'];
  if (s?.buckets?.shared) return ['', `Passes its checks. Former owners still serve ${one(s.buckets.shared, 'bucket')}.`];
  return ['', 'Passes its checks.'];
}

const stateGrade = (n) => gone(n) || n.now.unwell ? 'bad' : n.now.state === 'serving' && n.now.live && !n.said?.fenced ? 'ok' : 'warn';

function showNodes() {
  for (const n of nodes.values()) {
    if (!n.now) { n.part?.card.remove(); n.part = null; continue; }
    const x = n.now, s = n.said;
    if (!n.part) {
      n.part = nodeCard(n);
      const after = [...nodes.values()].filter((o) => o.part && o !== n && o.id > n.id).sort((a, b) => a.id < b.id ? -1 : 1)[0];
      $('nodelist').insertBefore(n.part.card, after?.part.card.isConnected ? after.part.card : null);
    }
    const p = n.part, grade = stateGrade(n);
    p.card.classList.toggle('gone', gone(n));
    set(p.name, called(n.id));
    attr(p.state, 'class', 'state ' + grade);
    set(p.state, { ok: '✓ ', warn: '▲ ', bad: '✕ ' }[grade] + (x.unwell && !gone(n) ? 'unwell' : x.state));
    set(p.share, `${x.buckets} buckets, ${Math.round(100 * x.buckets / buckets)} %`);
    p.sharebar.style.transform = `scaleX(${x.buckets / buckets})`;
    set(p.busy, Math.round(100 * x.busy) + ' %');
    p.busybar.style.transform = `scaleX(${Math.min(1, x.busy)})`;
    set(p.flows, number(n.flows));
    set(p.rate, number(n.rate));
    attr(p.spark, 'd', spark(n.id));
    const [tone, text] = health(n);
    attr(p.health, 'class', 'health ' + tone);
    set(p.health, text);
    p.health.title = text;
    set(p.path, s && !gone(n) ? `${s.datapath}${s.datapath === 'raw' ? '' : ', ' + s.ingress} on ${s.nic} · up ${duration(s.uptime_seconds)}` : '\u00a0');
    set(p.place, n.id + (live.leader === n.id ? ' · leader' : '') + (live.asked === n.id ? ' · asked' : ''));
    if (p.act) {
      const drained = !!s?.drain?.draining;
      p.act.disabled = gone(n);
      set(p.act, drained ? 'Resume…' : 'Drain…');
      attr(p.act, 'aria-label', (drained ? 'Resume ' : 'Drain ') + called(n.id));
    }
  }
}

function spark(id) {
  const last = history.slice(-120);
  const most = Math.max(1, ...last.map((h) => h.rate[id] || 0));
  return last.map((h, i) => `${i ? 'L' : 'M'}${(100 * i / Math.max(1, last.length - 1)).toFixed(1)} ${(28 - 26 * (h.rate[id] || 0) / most).toFixed(1)}`).join('');
}

// -- the graphs

function nice(v) {
  const power = 10 ** Math.floor(Math.log10(Math.max(v, 1)));
  return [1, 2, 4, 5, 10].map((f) => f * power).find((x) => x >= v);
}

const flagged = { lost: '✕', joined: '+', drain: '▽', resume: '△', left: '−', restarts: '↻' };

function graph(svg, what, now, name) {
  const w = 600, h = 150, plot = svg.parentNode;
  const x = (t) => w * (1 - (now - t) / 1000 / span);
  const ids = [...nodes.keys()].sort();
  const sums = history.map((s) => ids.reduce((sum, id) => sum + (s[what][id] || 0), 0));
  const most = nice(Math.max(4, ...sums) * 1.05);
  const parts = [0, 0.5, 1].map((f) => make('svg:line', { class: 'grid', x1: 0, x2: w, y1: h - f * h, y2: h - f * h }));
  const base = history.map(() => 0);
  for (const id of ids) {
    if (!history.some((s) => s[what][id])) continue;
    const low = base.map((b, i) => `${x(history[i].t).toFixed(1)} ${(h - h * b / most).toFixed(1)}`).reverse();
    history.forEach((s, i) => { base[i] += s[what][id] || 0; });
    const high = base.map((b, i) => `${x(history[i].t).toFixed(1)} ${(h - h * b / most).toFixed(1)}`);
    parts.push(make('svg:path', { class: 'area ' + node(id).color, d: 'M' + high.concat(low).join('L') + 'Z' }));
  }
  const flags = [];
  let free = Infinity;
  for (const e of happened) {
    if (now - e.at > span * 1000) break;
    if (!flagged[e.kind] || !history.length || e.at < history[0].t || e.kind === 'joined' && move === null) continue;
    parts.push(make('svg:line', { class: 'mark-line', x1: x(e.at), x2: x(e.at), y1: 0, y2: h }));
    const text = flagged[e.kind] + ' ' + called(e.about), half = 5 * text.length + 12; // of 600
    if (free - x(e.at) < 2 * half) continue;
    free = x(e.at);
    const flag = make('span', { class: 'flag', 'aria-hidden': 'true' }, text);
    flag.style.left = Math.min(w - half, Math.max(half, x(e.at))) / w * 100 + '%';
    flags.push(flag);
  }
  svg.replaceChildren(...parts);
  attr(svg, 'aria-label', `${number(sums.at(-1) || 0)} ${name} now; at most ${number(Math.max(0, ...sums))} in the last two minutes`);
  plot.querySelectorAll('.tick, .flag').forEach((e) => e.remove());
  for (const f of [0, 0.5, 1]) {
    const tick = make('span', { class: 'tick', 'aria-hidden': 'true' }, number(f * most));
    tick.style.top = 100 - 100 * f + '%';
    flags.push(tick);
  }
  plot.append(...flags);
}

// -- the lists

const clock = new Intl.DateTimeFormat([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false });

function showEvents(first) {
  const before = new Set([...$('events').children].map((e) => e.dataset.key));
  $('events').replaceChildren(...happened.slice(0, 100).map((h) => {
    const key = h.at + h.kind + h.text, grade = gradeOf(h.kind);
    const li = make('li', { class: grade + (first || before.has(key) ? '' : ' fresh') },
      make('span', { class: 'mark', 'aria-hidden': 'true' }), make('time', { datetime: new Date(h.at).toISOString() }, clock.format(h.at)), make('span', {}, sentence(h)));
    li.dataset.key = key;
    const why = [h.why && words(h.why, h.by), h.by.length > 1 || h.about && !h.by.includes(h.about) && h.kind !== 'map' ? 'seen by ' + names(h.by) : ''].filter(Boolean).join(' · ');
    if (why) li.append(make('p', { class: 'why' }, why));
    return li;
  }));
}

const levels = { critical: 'bad', warning: 'warn', info: 'info' };

function showFindings() {
  const all = [];
  for (const n of nodes.values()) {
    if (!n.now || gone(n)) continue;
    for (const f of n.said?.findings || []) all.push({ n, ...f });
  }
  all.sort((a, b) => Object.keys(levels).indexOf(a.level) - Object.keys(levels).indexOf(b.level));
  const text = JSON.stringify(all.map((f) => [f.n.id, f.code, f.level, f.what, f.fix]));
  if ($('findings').dataset.text === text) return;
  $('findings').dataset.text = text;
  $('findings').replaceChildren(...all.map((f) => make('li', { class: levels[f.level] || 'warn' },
    make('span', { class: 'mark', 'aria-hidden': 'true' }), make('b', {}, called(f.n.id) + ': '), make('span', { class: 'code' }, f.code || ''), ' ' + words(f.what, [f.n.id]),
    ...f.fix ? [make('p', { class: 'why' }, words(f.fix, [f.n.id]))] : [])));
  if (!all.length) $('findings').append(make('li', { class: 'none ok' }, make('span', { class: 'mark', 'aria-hidden': 'true' }), 'No node has noticed anything wrong of itself, its network or its services.'));
}

const meanings = {
  'accept-new': 'opens a connection in a bucket of this node', 'accept-flow': 'belongs to a connection of this node', 'accept-transit': 'let through while its bucket changes hands',
  'accept-own': 'answers what a node has asked from the VIP', 'accept-error': 'an ICMP error on a connection of this node', 'accept-fragment': 'a fragment without ports: every node takes it',
  'accept-neighbor': 'where another host is: every node takes it', 'accept-control': 'a multicast query: every node answers for itself', 'answer-neighbor': 'asks where the VIP is, and it is this node’s turn to say so',
  'drop-foreign': 'another node takes it', 'drop-draining': 'new, in a bucket that is being given away', 'drop-lease': 'new, and this node may not take new ones just now',
  'drop-no-socket': 'of no connection of this node, while its bucket changes hands', 'drop-not-ours': 'for another address', 'drop-protocol': 'a protocol that the cluster does not serve',
  'drop-vlan': 'of another VLAN', 'drop-runt': 'too short', 'drop-oversized': 'too long', 'drop-malformed': 'contradicts itself', 'drop-spoofed': 'claims to come from the VIP',
  'drop-clone-source': 'sent from the clone MAC, which nobody may', 'drop-clone-rarp': 'a RARP from the clone MAC, as a hypervisor sends it after a migration',
  'drop-quote': 'an ICMP error on something that was never sent', 'drop-router': 'redirects and router messages',
  'drop-own-announcement': 'another node speaks for the VIP', 'drop-conflict': 'a stranger claims the VIP', 'drop-disabled': 'a port that is closed by a rule',
  'send': 'leaves', 'send-open': 'leaves, and opens a connection', 'drop-rst': 'a reset held back, as another node may have the connection', 'delay-rst': 'a reset that waits',
  'drop-egress-source': 'does not speak for the VIP', 'drop-egress-malformed': 'no frame',
};
const groupOf = (v) => /^(accept|answer)/.test(v) ? 'take' : v === 'drop-foreign' ? 'leave' : /^(send|delay|drop-rst|drop-egress)/.test(v) ? 'out' : 'refuse';
const groups = { take: 'taken', leave: 'left to their owner', refuse: 'refused' };
const rows = new Map();
const pieces = {};

function showVerdicts() {
  const rate = {}, total = {}, sum = { take: 0, leave: 0, refuse: 0, out: 0 };
  for (const n of nodes.values()) {
    if (!n.now || gone(n)) continue;
    for (const [v, c] of Object.entries(n.totals)) {
      total[v] = (total[v] || 0) + c;
      rate[v] = (rate[v] || 0) + (n.rates[v] || 0);
      sum[groupOf(v)] += n.rates[v] || 0;
    }
  }
  const order = Object.keys(meanings);
  for (const v of Object.keys(total)) {
    if (rows.has(v)) continue;
    const r = { rate: make('td', { class: 'num' }), total: make('td', { class: 'num' }) };
    r.tr = make('tr', {}, make('td', {}, make('span', { class: 'code' }, v), make('small', {}, meanings[v] || '')), r.rate, r.total);
    rows.set(v, r);
    const place = (x) => (order.indexOf(x) + 1) || 999;
    const after = [...rows].filter(([o]) => place(o) > place(v)).sort((a, b) => place(a[0]) - place(b[0]))[0];
    $('verdicts').insertBefore(r.tr, after ? after[1].tr : null);
  }
  for (const [v, r] of rows) { set(r.rate, number(rate[v] || 0)); set(r.total, number(total[v] || 0)); }
  if (!pieces.bar) {
    pieces.bar = make('div', { class: 'bar', 'aria-hidden': 'true' });
    const legend = make('ul', { 'aria-hidden': 'true' });
    for (const g of Object.keys(groups)) {
      pieces.bar.append(pieces[g] = make('span', { class: 'v-' + g }));
      legend.append(pieces[g + 'text'] = make('li', { class: 'v-' + g }));
    }
    $('split').append(pieces.bar, legend);
  }
  const all = sum.take + sum.leave + sum.refuse;
  const said = [];
  for (const [g, name] of Object.entries(groups)) {
    const percent = all ? 100 * sum[g] / all : 0;
    pieces[g].style.width = percent + '%';
    set(pieces[g + 'text'], `${Math.round(percent)} % ${name}`);
    said.push(`${Math.round(percent)} % ${name}`);
  }
  attr($('split'), 'aria-label', `Of ${number(all)} frames per second that the nodes see: ` + said.join(', '));
}

function showBoots() {
  const all = live.nodes.map((x) => nodes.get(x.node)).filter((n) => !gone(n));
  const text = JSON.stringify(all.map((n) => [n.id, n.name, n.boot?.timeline, n.boot?.children?.map((c) => [c.name, c.state, c.restarts])]));
  if ($('boots').dataset.text === text) return;
  $('boots').dataset.text = text;
  $('boots').replaceChildren(...all.map((n) => {
    const b = n.boot, stages = b?.timeline || [];
    const end = stages.at(-1)?.at_seconds || 0;
    const li = make('li', { class: 'boot ' + n.color }, make('h3', {}, called(n.id), make('span', {}, b ? `${b.ready ? 'ready after' : 'so far'} ${end.toFixed(1)} s` : 'an ordinary host')));
    if (!b) {
      li.append(make('p', {}, 'How it booted is not the cluster’s to tell.'));
      return li;
    }
    const bar = make('div', { class: 'bar', 'aria-hidden': 'true' });
    let from = 0;
    for (const s of stages) {
      const piece = make('span', { title: s.stage });
      piece.style.width = (end ? 100 * (s.at_seconds - from) / end : 0) + '%';
      from = s.at_seconds;
      bar.append(piece);
    }
    li.append(bar, make('p', {}, stages.map((s) => `${s.stage} ${s.at_seconds.toFixed(1)} s`).join(' → ')));
    if (b.children?.length) li.append(make('p', {}, 'runs ' + list(b.children.map((c) => c.name + (c.state === 'running' ? '' : ` (${c.state})`) + (c.restarts ? `, restarted ${c.restarts} times` : '')))));
    return li;
  }));
}

// ---- orders

let order = null;

function ask(n) {
  const drained = !!n.said?.drain?.draining;
  order = { verb: drained ? 'resume' : 'drain', id: n.id };
  set($('asktitle'), (drained ? 'Have ' : 'Drain ') + called(n.id) + (drained ? ' take part again?' : '?'));
  set($('askwhat'), drained ? 'It takes its share of new connections again.' : `Its ${n.now.buckets} buckets go to the other nodes. Its ${one(n.flows, 'connection')} stay until they end.`);
  set($('askyes'), drained ? 'Resume' : 'Drain');
  set($('askerror'), '');
  $('askwhy').value = '';
  $('ask').showModal();
}

$('askno').addEventListener('click', () => $('ask').close());
$('ask').querySelector('form').addEventListener('submit', async (e) => {
  e.preventDefault();
  $('askyes').disabled = true;
  try {
    const r = await fetch(`../v1/${order.verb}?node=${encodeURIComponent(order.id)}`, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ reason: $('askwhy').value }),
    });
    if (!r.ok) throw new Error((await r.json()).error);
    $('ask').close();
  } catch (err) {
    set($('askerror'), err.message);
  } finally {
    $('askyes').disabled = false;
  }
});

connect();
