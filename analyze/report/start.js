"use strict";
// Theme, keys, addresses of latents (#latent-17), and the start of everything.

const THEMES = ["", "light", "dark"];

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  document.getElementById("theme").textContent = theme ? `Theme: ${theme}` : "Theme: system";
  try {
    localStorage.setItem("sae-report-theme", theme);
  } catch { /* a page from a file may have no storage */ }
}

function storedTheme() {
  try {
    const theme = localStorage.getItem("sae-report-theme");
    return THEMES.includes(theme) ? theme : "";
  } catch {
    return "";
  }
}

function openAddress() {
  const found = /^#latent-(\d+)$/.exec(location.hash);
  if (!found) return false;
  const latent = Number(found[1]), place = order.indexOf(latent);
  if (place >= 0) {
    cursor = place;
    showCursor();
  }
  openLatent(latent);
  return true;
}

function pageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if (typing) grid.focus();
    else if (panel.classList.contains("shown")) closeLatent();
  } else if (event.key === "Enter" && event.target === search && order.length) openLatent(order[cursor]);
  else if (typing) return;
  else if (event.key === "/") search.focus();
  else if (event.key === "j" || event.key === "k") moveCursor(event.key === "j" ? 1 : -1, true);
  else return;
  event.preventDefault();
}

function failed(error) {
  showNotes([`This browser cannot show the latents (${error.message}); one of 2024 or later can.`]);
  throw error;
}

async function start() {
  setTheme(storedTheme());
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length]);
  });
  showOverview();
  if (!about) return;
  document.getElementById("latents").hidden = false;
  await startTable();
  document.addEventListener("keydown", pageKey);
  addEventListener("hashchange", openAddress);
  const narrow = matchMedia("(max-width: 820px)").matches;
  if (!openAddress() && !narrow && order.length) openLatent(order[0], {address: false});
}
