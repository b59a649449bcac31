// Light or dark as the reader chose, before the first paint; a script of its own, since the page's
// policy allows no inline ones and a module would come too late.
try {
  const chosen = localStorage.getItem("maple.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // no storage in this browser: the system's choice holds
}
