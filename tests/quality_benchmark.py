"""What the tests of examples/benchmarks/quality share: its modules, and a tiny model and setting."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples/benchmarks/quality"
sys.path.insert(0, str(FOLDER))
names = ("llama", "tasks", "plan", "table_rules", "body_rules", "training", "run", "draw", "reported", "recipes")
llama, tasks, plan, table_rules, body_rules, training, campaigns, draw, reported, recipes = map(
    importlib.import_module, names
)
sys.path.remove(str(FOLDER))

TINY = llama.Shape(vocabulary=128, width=16, layers=2, heads=4, hidden=24, tied=False, key_value_heads=2)
SETTING = plan.Setting(TINY, "text", batch=2, length=16, steps=40, warmup=4, body_guess=-4)
