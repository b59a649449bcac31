// Signing in: a server that other machines reach asks for its token, once for each browser.

import * as api from "./api.js";
import { button, byId, input } from "./dom.js";
import { complain } from "./say.js";

let admitted = () => {};
let isAsking = false;
let isNeeded = false; // whether this server has a token

/**
 * Go on when the server lets this browser in; the sign-in form comes where it does not yet.
 * @returns {Promise<void>}
 */
export async function enter() {
  byId("sign-in-form").addEventListener("submit", (event) => {
    event.preventDefault();
    void signIn();
  });
  byId("sign-out").addEventListener("click", () => signOut().catch(complain));
  api.whenUnauthorized(ask);
  const session = await api.get("/session");
  isNeeded = session.token_needed;
  if (session.token_needed && !session.signed_in) {
    const done = new Promise((resolve) => (admitted = () => resolve(undefined)));
    ask();
    await done;
  } else show(true);
}

/** The form, also in the middle of things: the token was changed, or the cookie has ended. */
function ask() {
  if (isAsking) return;
  isAsking = true;
  for (const open of document.querySelectorAll("dialog[open]"))
    /** @type {HTMLDialogElement} */ (open).close();
  show(false);
  input("token").value = "";
  input("token").focus();
}

async function signIn() {
  const token = input("token").value.trim();
  tell(token ? "" : "Write the token first.");
  if (!token) return input("token").focus();
  button("sign-in-button").disabled = true;
  try {
    await api.post("/session", { token });
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    tell(error.status === 401 ? "That is not this server's token." : error.message);
    input("token").select();
    return;
  } finally {
    button("sign-in-button").disabled = false;
  }
  isAsking = false;
  input("token").value = "";
  isNeeded = true;
  show(true);
  byId("prompt").focus();
  admitted();
}

async function signOut() {
  await api.remove("/session");
  location.reload();
}

/** @param {string} problem */
function tell(problem) {
  byId("sign-in-problem").textContent = problem;
  input("token").setAttribute("aria-invalid", String(problem !== ""));
}

/** @param {boolean} isIn */
function show(isIn) {
  byId("studio").hidden = !isIn;
  byId("sign-in").hidden = isIn;
  byId("sign-out").hidden = !isIn || !isNeeded;
}
