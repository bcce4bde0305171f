"""A bank whose transfers never create or lose money, whatever crashes: two accounts, two partitions, one table.

The two accounts of a transfer belong to different partitions as a rule, and no commit spans what two tasks do. So a
transfer has two legs. `debit` works in the payer's partition: it takes the money from the balance and sends the credit
leg, in one commit. `credit` works in the payee's partition, when the leg arrives there. In between the money is on its
way, in the topic `bank-credits`, and in no balance; it cannot be lost or arrive twice, since each step is exactly once.

Every change of a balance is an entry in `bank-entries`, with the balance after it. The account `cash` is the world
outside: it alone may be below zero, so that all balances, with what is on its way, add up to 0 at any time.

    streamflow send examples/bank.py bank-transfers '{"id": 1, "payer": "cash", "payee": "ann", "cents": 5000}'
    streamflow worker examples/bank.py --until-end
    streamflow send examples/bank.py bank-transfers '{"id": 2, "payer": "ann", "payee": "bob", "cents": 1999}'
    streamflow send examples/bank.py bank-transfers '{"id": 3, "payer": "ann", "payee": "bob", "cents": 9000}'
    streamflow worker examples/bank.py --until-end
    streamflow tail examples/bank.py bank-entries --until-end
    streamflow tail examples/bank.py bank-refused --until-end

The third one is refused: ann does not have that much.
"""

from typing import Annotated

import msgspec

import streamflow as sf

CASH = "cash"


class Transfer(msgspec.Struct):
    id: int
    payer: str
    payee: str
    cents: Annotated[int, msgspec.Meta(gt=0)]


class Entry(msgspec.Struct):
    """One change of one balance."""

    transfer: int
    cents: int
    balance: int


# Both agents write the table, so they form one sub-topology: for each partition one task runs them both, and a balance
# is only ever in one pair of hands. Transfers come in with any key or none, hence `group_by`.
app = sf.App("bank", processing_guarantee="exactly_once")  # refuse to start where the log could not promise it
transfers = app.topic("bank-transfers", value_type=Transfer)
credits = app.topic("bank-credits", key_type=str, value_type=Transfer)
entries = app.topic("bank-entries", key_type=str, value_type=Entry)
refused = app.topic("bank-refused", key_type=str, value_type=Transfer)
balances = app.table("balances", key_type=str, value_type=int, default=int, help="cents by account")


@app.agent(transfers.group_by("payer", key_type=str), sink=entries)
async def debit(transfer: Transfer) -> Entry | None:
    """The payer's leg; it goes through or is refused, with nothing in between."""
    balance = balances[transfer.payer] - transfer.cents
    if balance < 0 and transfer.payer != CASH:
        await refused.send(key=transfer.payer, value=transfer)
        return None
    balances[transfer.payer] = balance
    await credits.send(key=transfer.payee, value=transfer)
    return Entry(transfer.id, -transfer.cents, balance)


@app.agent(credits, sink=entries)
async def credit(transfer: Transfer) -> Entry:
    """The payee's leg; nothing can refuse it any more."""
    balances[transfer.payee] += transfer.cents
    return Entry(transfer.id, transfer.cents, balances[transfer.payee])


if __name__ == "__main__":
    app.main()
