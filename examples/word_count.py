"""Word count: lines without keys are cut into words, `group_by` brings equal words together, a table counts them.

    streamflow send examples/word_count.py lines --file LICENSE
    streamflow worker examples/word_count.py --until-end
    streamflow tail examples/word_count.py counts --until-end
    streamflow table scan examples/word_count.py counted
    streamflow topology examples/word_count.py

Send more and run the worker again: the counts go on. The table lies in `.streamflow/` beside the log, and behind it
stands the topic `word-count-counted-changelog`, from which it comes back when the folder is lost.
"""

import re
from collections.abc import AsyncIterator

import streamflow as sf

app = sf.App("word-count")
lines = app.topic("lines", value_type=str)  # no keys: the lines of a file have none
words = app.topic("words", value_type=str)
counts = app.topic("counts", key_type=str, value_type=int)
counted = app.table("counted", key_type=str, value_type=int, default=int)


@app.agent(lines, sink=words)
async def split(stream: sf.Stream[str]) -> AsyncIterator[str]:
    async for line in stream:
        for word in re.findall(r"[a-z']+", line.lower()):
            yield word


# A word's count has one place: the partition that all records with this word go to. Without `group_by` a word would be
# counted wherever its line happens to be, and the first write of a count is refused with a message that says so.
@app.agent(words.group_by(lambda word: word, name="by-word", key_type=str), sink=counts)
async def count(stream: sf.Stream[str]) -> AsyncIterator[int]:
    async for word in stream:
        counted[word] += 1
        yield counted[word]  # with the word as its key, which is inherited


if __name__ == "__main__":
    app.main()
