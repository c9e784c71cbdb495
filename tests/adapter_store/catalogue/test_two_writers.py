"""Two servers change names in any order, restart and sweep; a dictionary says what must be true."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue, sweep
from loraplex_adapter_store.errors import InvalidSelector, RevisionConflict, UnknownAdapter
from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.card import CardEdit
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.catalogue.conftest import ALWAYS_ASK
from tests.adapter_store.catalogue.test_contents import age
from tests.adapter_store.conftest import plain_lora
from tests.adapter_store.test_store import seed_of
from tests.support.bases.tiny_models import tiny_llama

N_KEPT = 2
HOUR = 3601.0

servers = st.sampled_from("ab")
names = st.sampled_from(["x", "team:x", "team:x/y"])
seeds = st.integers(1, 4)


@dataclass
class Name:
    seeds: list[int]  # the current one, then the kept ones
    revision: int
    description: str | None = None


@dataclass
class Model:
    names: dict[str, Name] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)  # the highest revision ever

    def put(self, name: str, seed: int) -> None:
        revision = self.last[name] = self.last.get(name, 0) + 1
        before = self.names[name].seeds if name in self.names else []
        kept = [old for old in before if old != seed][:N_KEPT]
        self.names[name] = Name([seed, *kept], revision)


class TwoServers(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.base = BaseSpec.of(tiny_llama(), "tiny-llama")
        self.catalogue = Catalogue.open(f"file://{self.folder}/catalogue", self.base)
        self.stores = {server: self.opened(server) for server in "ab"}
        self.model = Model()
        self.leases: list[tuple[AdapterLease, int]] = []
        self.digests: dict[tuple[str, int], str] = {}  # (tenant, seed) → digest

    def opened(self, server: str) -> AdapterStore:
        return AdapterStore(
            self.folder / server,
            self.base,
            catalogue=self.catalogue,
            catalogue_limits=ALWAYS_ASK,
            n_kept_revisions=N_KEPT,
        )

    def put_in(self, server: str, name: str, seed: int, **options: object) -> None:
        config, tensors = plain_lora(seed)
        given = PutOptions(**options)  # type: ignore[arg-type]
        card = self.stores[server].put_tensors(name, config, tensors, options=given)  # type: ignore[arg-type]
        assert self.digests.setdefault((name.rpartition(":")[0], seed), card.digest) == card.digest

    @rule(server=servers, name=names, seed=seeds)
    def put(self, server: str, name: str, seed: int) -> None:
        self.put_in(server, name, seed)
        self.model.put(name, seed)

    @rule(server=servers, name=names, seed=seeds)
    def make(self, server: str, name: str, seed: int) -> None:
        if name in self.model.names:
            with pytest.raises(RevisionConflict):
                self.put_in(server, name, seed, replace=False)
        else:
            self.put_in(server, name, seed, replace=False)
            self.model.put(name, seed)

    @rule(server=servers, name=names, seed=seeds, seen=seeds)
    def compare_and_set(self, server: str, name: str, seed: int, seen: int) -> None:
        digest = self.digests.get((name.rpartition(":")[0], seen), "0" * 64)
        known = self.model.names.get(name)
        if known is None or known.seeds[0] != seen:
            with pytest.raises(RevisionConflict):
                self.put_in(server, name, seed, if_match=digest)
        else:
            self.put_in(server, name, seed, if_match=digest)
            self.model.put(name, seed)

    @rule(server=servers, name=names)
    def delete(self, server: str, name: str) -> None:
        if name in self.model.names:
            del self.model.names[name]
            self.stores[server].start_delete(name)
        else:
            with pytest.raises(UnknownAdapter):
                self.stores[server].start_delete(name)

    @rule(server=servers, name=names)
    def roll_back(self, server: str, name: str) -> None:
        known = self.model.names.get(name)
        if known is None or len(known.seeds) == 1:
            with pytest.raises((UnknownAdapter, InvalidSelector)):
                self.stores[server].rollback(name)
        else:
            self.stores[server].rollback(name)
            self.model.put(name, known.seeds[1])

    @rule(server=servers, name=names, text=st.sampled_from(["one", "two"]))
    def edit(self, server: str, name: str, text: str) -> None:
        if name not in self.model.names:
            return
        self.stores[server].edit(name, lambda card: CardEdit(text, (), {}))
        self.model.names[name].description = text

    @rule(server=servers, name=names)
    def begin_a_request(self, server: str, name: str) -> None:
        if name in self.model.names:
            lease = self.stores[server].acquire(name)
            self.leases.append((lease, self.model.names[name].seeds[0]))

    @rule(server=servers)
    def restart(self, server: str) -> None:
        self.stores[server].close()
        self.stores[server] = self.opened(server)

    @rule()
    def sweep_an_hour_later(self) -> None:
        age(self.folder / "catalogue", HOUR)
        sweep(self.catalogue)

    @precondition(lambda self: self.leases)
    @rule()
    def end_a_request(self) -> None:
        lease, seed = self.leases.pop(0)
        assert seed_of(lease.plan) == seed
        lease.release()

    @invariant()
    def every_server_serves_what_the_model_says(self) -> None:
        for lease, seed in self.leases:
            assert seed_of(lease.plan) == seed
        for store in self.stores.values():
            cards = {card.name: card for card in store.list()}
            assert set(cards) == set(self.model.names)
            for name, known in self.model.names.items():
                assert cards[name].revision == known.revision
                assert known.description in (None, cards[name].description)
                with store.acquire(name) as lease:
                    assert seed_of(lease.plan) == known.seeds[0]
                tenant = name.rpartition(":")[0]
                wanted = [self.digests[tenant, seed] for seed in known.seeds]
                assert [card.digest for card in store.revisions(name)] == wanted

    def teardown(self) -> None:
        for lease, _ in getattr(self, "leases", ()):
            lease.release()
        for store in getattr(self, "stores", {}).values():
            store.close()
        shutil.rmtree(self.folder)


TestTwoServers = TwoServers.TestCase
TestTwoServers.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
