"""Pictures of the page of ``ember-mlx watch``: light, dark, on a phone, and while a log grows.

    pip install playwright && python tests/watch_in_a_browser.py FOLDER [CHROMIUM]

It needs Chromium, whose path is /usr/bin/chromium unless given; playwright's own browser is not fetched. What can be
checked is checked, and the pictures in FOLDER are to be looked at. Not part of the suite: it takes 15 seconds.
"""

import json
import math
import random
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from ember_mlx.watch.following import RunFile
from ember_mlx.watch.server import PageServer

PROMPTS = ("What does json.dumps(obj) do?", "</script><script>document.title='hacked'</script>")


def lines(optimizer, first, last, iters=300):
    """What a run logs from one step to another."""
    draw = random.Random(first)
    if not first:
        options = {"model": "Qwen/Qwen3-0.6B", "iters": iters, "table_optimizer": optimizer, "seed": 0}
        yield {"event": "start", "step": 0, "format": 1, "options": options, "versions": {"mlx": "0.32.4"}}
    for step in range(first, last + 1, 5):
        loss = (1.0 if optimizer == "ember" else 1.1) * (1.5 + 1.5 * math.exp(-step / 60))
        rate = min(1, step / 30)
        if step:
            values = {"train_loss": loss + draw.gauss(0, 0.05), "learning_rate": 1e-5 * rate, "peak_memory": 3.21e9}
            values |= {"table_learning_rate": 1e-4 * rate, "tokens_per_second": draw.gauss(3500, 50)}
            values |= {"update_ratio_tables": 1e-4 * math.exp(-step / 100), "update_ratio_body": 1e-4 * draw.random()}
            yield {"event": "train", "step": step} | values
        if step % 50 == 0:
            yield {"event": "validation", "step": step, "validation_loss": loss + 0.05}
            answers = [{"prompt": prompt, "answer": f"An answer\nof step {step}: <b>text</b>"} for prompt in PROMPTS]
            yield {"event": "samples", "step": step, "samples": answers}
    if last == iters:
        yield {"event": "end", "step": last, "validation_loss": loss}


def append(path, *of):
    with open(path, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines(*of)))


def main(folder, chromium="/usr/bin/chromium"):
    folder = Path(folder)
    folder.mkdir(parents=True)
    logs = [folder / name for name in ("ember.jsonl", "adamw.jsonl")]
    append(logs[1], "adamw", 0, 300)
    server = PageServer([RunFile(log) for log in logs], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, broken = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: broken.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: broken.append(str(error)))

        def picture(name):
            page.screenshot(path=folder / f"{name}.png", full_page=True)

        page.goto(server.url)
        page.get_by_text("waiting for").wait_for()
        picture("waiting")
        append(logs[0], "ember", 0, 60)
        page.get_by_text("60 of 300").wait_for()
        chart = page.locator("svg.chart").first
        chart.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        reading = page.locator(".reading").first
        before = reading.text_content()
        page.locator("#samples summary").first.click()
        append(logs[0], "ember", 65, 300)
        page.get_by_text("300 of 300").nth(1).wait_for()
        assert page.locator("#samples details").first.get_attribute("open") is not None, "what was opened stays open"
        assert before.startswith("step "), before
        picture("light")
        page.locator("#options summary").click()
        page.emulate_media(color_scheme="dark")
        picture("dark")
        page.set_viewport_size({"width": 360, "height": 740})
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, f"{width} pixels wide on a phone of 360"
        picture("phone")
        assert page.title() != "hacked"
        assert not broken, broken
        assert all(url.startswith((server.url, "data:")) for url in asked), asked
        page.context.set_offline(True)
        page.get_by_text("does not answer").wait_for()
        picture("gone")
        page.context.set_offline(False)
        page.get_by_text("does not answer").wait_for(state="hidden")
        browser.close()
    print(f"Look at {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
