"""A pytest plugin for where tests run slowly: of each test function's cases the first, the middle one and the last."""


def pytest_collection_modifyitems(config, items):
    functions = {}
    for item in items:
        functions.setdefault((item.path, item.originalname), []).append(item)
    kept = {cases[i] for cases in functions.values() for i in (0, len(cases) // 2, -1)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
