// Uploads in pieces: what breaks off goes on where it was, also after the page was left and the same files are chosen.
(() => {
  "use strict";
  const form = document.querySelector("[data-upload]");
  if (!form) return;
  const PIECE = 8 << 20, AT_ONCE = 3, KEPT = "talaria.upload";
  const words = form.dataset, part = name => form.querySelector(`[data-${name}]`);
  const bar = part("progress"), list = part("list"), problem = part("problem"), button = form.querySelector("button.primary");
  let dropped = [];

  const chosen = () => {
    const found = [...dropped];
    form.querySelectorAll("input[type=file]").forEach(input => {
      for (const file of input.files) found.push({file, path: file.webkitRelativePath || file.name});
    });
    return found;
  };
  const size = count => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let at = 0;
    for (; count >= 1000 && at < units.length - 1; at += 1) count /= 1000;
    return `${count.toPrecision(3).replace(/\.?0+$/, "")} ${units[at]}`;
  };
  const filled = (template, values) => template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const sum = files => files.reduce((total, one) => total + one.file.size, 0);
  const show = () => {
    const files = chosen();
    list.textContent = files.length ? filled(words.chosen, {count: files.length, size: size(sum(files))}) : "";
  };
  form.addEventListener("change", event => { if (event.target.type === "file") show(); });

  // Folders that are dropped, with all that is below them.
  const read = async entry => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      return [{file, path: entry.fullPath.replace(/^\//, "")}];
    }
    const reader = entry.createReader(), found = [];
    for (;;) {  // a reader gives a hundred at a time
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return found;
      for (const one of some) found.push(...await read(one));
    }
  };
  const zone = part("drop");
  for (const kind of ["dragenter", "dragover"]) {
    zone.addEventListener(kind, event => { event.preventDefault(); zone.classList.add("over"); });
  }
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", async event => {
    event.preventDefault();
    zone.classList.remove("over");
    const entries = [...event.dataTransfer.items].map(one => one.webkitGetAsEntry()).filter(Boolean);
    for (const entry of entries) dropped.push(...await read(entry));
    show();
  });

  class Refused extends Error {}
  class Away extends Error {}
  const call = async (method, path, options = {}) => {
    const answer = await fetch(path, {method, ...options});
    const body = await answer.json().catch(() => ({}));
    if (answer.ok) return body;
    if (answer.status >= 500 || answer.status === 408) throw new Away(body.error || "");
    const refused = new Refused(body.error || answer.statusText);
    refused.status = answer.status;
    throw refused;
  };
  const wait = seconds => new Promise(resolve => setTimeout(resolve, seconds * 1000));
  // Again and again while the server is away; what it refuses is not tried again.
  const patiently = async work => {
    for (let pause = 1; ; pause = Math.min(30, pause * 2)) {
      try { return await work(); } catch (error) {
        if (error instanceof Refused) throw error;
        bar.querySelector("[data-words]").textContent = (error instanceof Away && error.message) || words.again;
        await wait(pause);
      }
    }
  };

  const mark = (files, asked) => {
    let hash = 5381;
    const all = JSON.stringify([asked, files.map(one => [one.path, one.file.size, one.file.lastModified])]);
    for (let at = 0; at < all.length; at += 1) hash = (hash * 33 ^ all.charCodeAt(at)) >>> 0;
    return `${files.length}-${all.length}-${hash}`;
  };
  const begun = async (files, asked) => {
    const print = mark(files, asked);
    const kept = JSON.parse(localStorage.getItem(KEPT) || "null");
    if (kept?.print === print) {
      try { return {id: kept.id, ...await call("GET", `/talaria/uploads/${kept.id}`)}; } catch (error) {
        if (!(error instanceof Refused)) throw error;
      }
    }
    const body = JSON.stringify({...asked, files: files.map(one => [one.path, one.file.size])});
    const made = await call("POST", "/talaria/uploads", {body, headers: {"Content-Type": "application/json"}});
    localStorage.setItem(KEPT, JSON.stringify({print, id: made.id}));
    return {id: made.id, have: files.map(() => 0), run: ""};
  };

  const upload = async (files, asked, looked) => {
    const {id, have, whole, run} = await patiently(() => begun(files, asked));
    const total = sum(files), at = performance.now(), before = have.reduce((one, two) => one + two, 0);
    const told = () => {
      const done = have.reduce((one, two) => one + two, 0), seconds = (performance.now() - at) / 1000;
      const rate = (done - before) / Math.max(1, seconds);
      bar.querySelector("progress").value = total ? 100 * done / total : 100;
      bar.querySelector("[data-words]").textContent = filled(words.working, {
        done: size(done), all: size(total), rate: size(rate),
        left: rate > 0 && seconds > 5 ? `${Math.floor((total - done) / rate / 60)}:${String(Math.floor((total - done) / rate) % 60).padStart(2, "0")}` : "–",
      });
    };
    let next = 0;
    const work = async () => {
      while (next < files.length) {
        const number = next++, {file} = files[number];
        do {
          await patiently(async () => {
            const body = file.slice(have[number], have[number] + PIECE);
            try {
              const headers = {"Upload-Offset": String(have[number]), "Content-Type": "application/octet-stream"};
              have[number] = (await call("POST", `/talaria/uploads/${id}/${number}`, {body, headers})).offset;
            } catch (error) {  // how much of it has come is known there
              const known = (await call("GET", `/talaria/uploads/${id}`)).have[number];
              if (error instanceof Refused && known === have[number]) throw error;
              have[number] = known;
              if (!(error instanceof Refused)) throw error;
            }
          });
          told();
        } while (have[number] < file.size);
      }
    };
    if (!run && !whole) await Promise.all(Array.from({length: AT_ONCE}, work));
    bar.querySelector("[data-words]").textContent = words.sending;
    if (looked) return {location: `/talaria/uploads/${id}/plan`};
    return patiently(() => call("POST", `/talaria/uploads/${id}/send`));
  };

  let busy = false;
  addEventListener("beforeunload", event => { if (busy) event.preventDefault(); });
  form.addEventListener("submit", async event => {
    event.preventDefault();
    if (busy) return;
    const files = chosen(), data = new FormData(form);
    const asked = {to: data.getAll("to"), priority: data.get("priority"), exclude: data.get("exclude"), each: data.get("each")};
    problem.hidden = true;
    busy = button.disabled = true;
    bar.hidden = false;
    try {
      if (!files.length) throw new Refused(words.none);
      const {location} = await upload(files, asked, event.submitter?.value === "plan");
      localStorage.removeItem(KEPT);
      busy = false;
      window.location.assign(location);
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      bar.hidden = true;
    } finally {
      busy = button.disabled = false;
    }
  });
})();
