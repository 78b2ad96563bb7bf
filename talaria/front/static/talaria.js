// What pages do beyond plain forms and links: each works without it.
(() => {
  "use strict";
  const theme = localStorage.getItem("talaria.theme");
  if (theme) document.documentElement.dataset.theme = theme;

  // Times in the reader's zone; the server writes UTC.
  const local = root => root.querySelectorAll("time[datetime]").forEach(one => {
    const time = new Date(one.dateTime);
    if (isNaN(time)) return;
    one.title = one.title || one.textContent;
    const timeStyle = one.dataset.exact === undefined ? "short" : "medium";
    one.textContent = time.toLocaleString([], {dateStyle: "medium", timeStyle});
  });

  const announce = words => { document.getElementById("said").textContent = words; };

  document.addEventListener("click", async event => {
    const button = event.target.closest("[data-copy],[data-theme-switch],[data-opens],[data-closes]");
    if (!button) return;
    if (button.dataset.copy !== undefined) {
      if (navigator.clipboard) {
        await navigator.clipboard.writeText(button.dataset.copy);
        announce(button.dataset.copied);
      } else {  // not on a page without TLS
        const range = document.createRange();
        range.selectNodeContents(button.previousElementSibling);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
      }
    } else if (button.dataset.themeSwitch !== undefined) {
      const dark = matchMedia("(prefers-color-scheme: dark)").matches;
      const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
      const next = now === "dark" ? "light" : "dark";
      document.documentElement.dataset.theme = next;
      localStorage.setItem("talaria.theme", next);
    } else if (button.dataset.opens) {
      event.preventDefault();
      document.getElementById(button.dataset.opens).showModal();
    } else if (button.dataset.closes !== undefined) {
      event.preventDefault();
      button.closest("dialog").close();
    }
  });

  // A secret is typed only if it is to be replaced.
  document.addEventListener("input", event => {
    const secret = event.target.closest("[data-secret]");
    if (secret && event.target.matches("input[type=password],textarea") && event.target.value) {
      const replace = secret.querySelector("input[type=radio][value=replace]");
      if (replace) replace.checked = true;
    }
  });

  // A box that picks all lines of a table.
  document.addEventListener("change", event => {
    const name = event.target.dataset.all;
    if (name) event.target.form.querySelectorAll(`input[name=${name}]`).forEach(one => { one.checked = event.target.checked; });
  });
  const pickers = root => root.querySelectorAll("[data-all]").forEach(one => { one.hidden = false; });

  // A form that is left with changes asks first; one that is sent is sent once.
  let changed = false;
  document.addEventListener("change", event => { if (event.target.form?.dataset.watched !== undefined) changed = true; });
  document.addEventListener("submit", event => {
    if (event.target.dataset.watched === undefined) return;
    if (event.target.dataset.sent !== undefined) { event.preventDefault(); return; }
    if (event.submitter?.dataset.stays === undefined) { changed = false; event.target.dataset.sent = ""; }
  });
  addEventListener("pageshow", () => document.querySelectorAll("[data-sent]").forEach(one => { delete one.dataset.sent; }));
  addEventListener("beforeunload", event => { if (changed) event.preventDefault(); });

  document.addEventListener("keydown", event => {
    if (event.key === "/" && !event.target.closest("input,textarea,select") && !event.ctrlKey && !event.metaKey) {
      const search = document.querySelector("input[type=search]");
      if (search) { event.preventDefault(); search.focus(); }
    }
  });

  // Sections become tabs; without scripts they stand below each other. Arrows move between them.
  const tabs = root => root.querySelectorAll("[data-tabs]").forEach(box => {
    const parts = [...box.children].filter(one => one.dataset.tab);
    if (parts.length < 2 || box.querySelector("[role=tablist]")) return;
    const list = document.createElement("div");
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", box.dataset.tabs);
    const buttons = parts.map(part => {
      const button = document.createElement("button");
      button.type = "button";
      button.id = `tab-${part.id}`;
      button.textContent = part.dataset.tab;
      button.setAttribute("role", "tab");
      button.setAttribute("aria-controls", part.id);
      part.setAttribute("role", "tabpanel");
      part.setAttribute("aria-labelledby", button.id);
      list.append(button);
      return button;
    });
    const show = chosen => parts.forEach((part, at) => {
      part.hidden = at !== chosen;
      buttons[at].setAttribute("aria-selected", String(at === chosen));
      buttons[at].tabIndex = at === chosen ? 0 : -1;
    });
    list.addEventListener("click", event => { const at = buttons.indexOf(event.target); if (at >= 0) show(at); });
    list.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      const at = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
      show(at);
      buttons[at].focus();
    });
    box.prepend(list);
    const wrong = parts.findIndex(part => part.querySelector("[aria-invalid],[data-wrong]"));
    show(Math.max(0, wrong));
  });

  // A link to a field that is wrong shows it, wherever it is folded away.
  document.addEventListener("click", event => {
    const link = event.target.closest("[data-errors] a[href^='#']");
    const field = link && document.getElementById(link.hash.slice(1));
    if (!field) return;
    event.preventDefault();
    const part = field.closest("[data-tab]");
    if (part?.hidden) document.getElementById(`tab-${part.id}`).click();
    for (let one = field.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    field.focus();
  });

  // An answer that is no page, as where the session has ended, and a poll that fails, leave what is shown.
  const trouble = words => {
    const note = document.getElementById("trouble");
    note.textContent = words;
    note.hidden = !words;
  };
  const again = element => {
    if (element.matches("#now,#check")) setTimeout(() => window.htmx.trigger(element, "again"), 5000);
  };
  document.addEventListener("htmx:beforeSwap", event => {
    const {xhr, requestConfig, elt} = event.detail;
    const frame = document.getElementById("trouble").dataset;
    const poll = requestConfig.verb === "get" && elt.matches("#now,#check");
    trouble("");
    if (xhr.status < 400 || (!poll && xhr.responseText.includes('id="content"'))) return;
    event.detail.shouldSwap = false;
    trouble(xhr.status === 401 ? frame.login : frame.away);
    if (xhr.status !== 401 && xhr.status !== 404) again(elt);
  });
  document.addEventListener("htmx:sendError", event => {
    trouble(document.getElementById("trouble").dataset.away);
    again(event.detail.elt);
  });

  document.addEventListener("htmx:afterSwap", event => {
    const root = event.detail.elt.parentElement || document;
    local(root);
    tabs(root);
    pickers(root);
    root.querySelector("[data-errors]")?.focus();
  });
  document.addEventListener("DOMContentLoaded", () => {
    local(document);
    tabs(document);
    pickers(document);
    document.querySelector("[data-errors]")?.focus();
  });
})();
