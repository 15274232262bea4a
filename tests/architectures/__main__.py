"""`python -m architectures`, in `tests`: every model file, its tables, or why it was not built; then the count."""

from architectures.build import Case, examine, model_files

if __name__ == "__main__":
    cases = {name: examine(name, False) for name in model_files()}
    for name, case in cases.items():
        built = isinstance(case, Case)
        print(f"{name:24s}", "; ".join(f"{p} {r}" for p, r in case.traced.items()) if built else f"not built: {case}")
    print(f"built and traced: {sum(isinstance(case, Case) for case in cases.values())} of {len(cases)} files")
