// Run by `node --test tests/serve/page/`.
import assert from "node:assert/strict";
import test from "node:test";
import { Ledger } from "../../../mlx_maple/serve/page/ledger.js";

test("the oldest ended jobs are let go, never a live one nor the one that is shown", () => {
  const ledger = new Ledger(3);
  ledger.put({ id: "waits", state: "queued" });
  ledger.put({ id: "shown", state: "done" });
  for (let i = 0; i < 10_000; i++) {
    ledger.put({ id: `job ${i}`, state: i % 2 ? "failed" : "done" });
    ledger.tell(`job ${i}`);
    ledger.forget("shown");
  }
  assert.equal(ledger.size, 4);
  assert.deepEqual(
    ledger.live().map((job) => job.id),
    ["waits"],
  );
  assert.ok(ledger.get("shown") && ledger.get("job 9999") && !ledger.get("job 9997"));
  assert.equal(ledger._told.size, 2);
});

test("an end is heard once, also by who asks late", () => {
  const ledger = new Ledger();
  const heard = [];
  ledger.whenEnded("a", (job) => heard.push(job.state));
  ledger.put({ id: "a", state: "running" });
  assert.deepEqual(heard, []);
  ledger.put({ id: "a", state: "done" });
  ledger.put({ id: "a", state: "done" });
  ledger.whenEnded("a", (job) => heard.push(`late ${job.state}`));
  assert.deepEqual(heard, ["done", "late done"]);
  assert.equal(ledger._waiters.size, 0);
  ledger.put({ id: "a", state: "running" }); // an answer that an event has overtaken
  assert.deepEqual([ledger.get("a").state, ledger.live()], ["done", []]);
  assert.deepEqual([ledger.tell("a"), ledger.tell("a")], [true, false]);
});
