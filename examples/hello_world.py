"""Hello, world: one topic in, one agent, one topic out.

    streamflow send examples/hello_world.py names Ann
    streamflow worker examples/hello_world.py --until-end
    streamflow tail examples/hello_world.py greetings --limit 1

Without `--until-end` the worker goes on, and greets every name that is sent, until Ctrl-C.
"""

import streamflow as sf

app = sf.App("hello-world")
names = app.topic("names", value_type=str)
greetings = app.topic("greetings", value_type=str)


@app.agent(names, sink=greetings)
async def greet(name: str) -> str:
    return f"Hello, {name}!"


if __name__ == "__main__":
    app.main()  # `python examples/hello_world.py worker` is `streamflow worker examples/hello_world.py`
