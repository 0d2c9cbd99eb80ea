package nlm

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// busy makes a state by a row of random records, as a server would write them,
// and returns the journal with the offset behind each record.
func busy(seed uint64, steps int) (s *state, journal []byte, ends []int) {
	rng := rand.New(rand.NewPCG(seed, 2))
	s = newState()
	add := func(x entry) {
		journal = appendRecord(journal, x)
		ends = append(ends, len(journal))
		s.apply(x)
	}
	add(entry{kind: opBoot, bootID: "boot", lock: lock{state: 7}})
	for range steps {
		file := []string{"f", "g"}[rng.IntN(2)]
		start := rng.Uint64N(100)
		l := lock{
			owner: owner{[]netip.Addr{clientA, clientB}[rng.IntN(2)], int32(rng.IntN(3))}, span: span{start, start + rng.Uint64N(20)},
			exclusive: rng.IntN(2) == 0, state: int32(rng.IntN(2)), confirmed: true, oh: "oh",
		}
		if !s.clients[l.client] {
			add(entry{kind: opClient, lock: lock{owner: owner{client: l.client}}})
		}
		switch rng.IntN(12) {
		case 0, 1, 2, 3:
			if s.conflict(file, l) == nil {
				add(entry{kind: opLock, file: file, lock: l})
			}
		case 4, 5:
			add(entry{kind: opUnlock, file: file, lock: l})
		case 6, 7:
			add(entry{kind: opWait, file: file, waiter: &waiter{id: s.nextID + 1, file: file, want: l, caller: "me", handle: []byte("fh"), offset: l.start}})
		case 8:
			if w := s.grantable(file); w != nil {
				add(entry{kind: opGrant, id: w.id})
			}
		case 9:
			for id := range s.byID {
				add(entry{kind: opForget, id: id})
				break
			}
		case 10:
			add(entry{kind: opShare, file: file, share: share{owner: owner{client: l.client}, oh: "oh", mode: 1, access: 2}})
		case 11:
			if rng.IntN(8) == 0 {
				add(entry{kind: opRelease, lock: lock{owner: owner{client: l.client}, state: int32(rng.IntN(2))}})
			}
		}
	}
	return s, journal, ends
}

func same(t *testing.T, got, want *state) {
	t.Helper()
	// A snapshot lists the clients in the order of a map.
	if a, b := sortedRecords(got.snapshot()), sortedRecords(want.snapshot()); a != b {
		t.Fatalf("states differ:\n%q\n%q", a, b)
	}
	for c := range want.clients {
		if got.held[c] != want.held[c] {
			t.Fatalf("%s holds %d locks, want %d", c, got.held[c], want.held[c])
		}
	}
}

func sortedRecords(snapshot []byte) string {
	s := newState()
	if s.replay(snapshot) != len(snapshot) {
		return "a snapshot that can't be read"
	}
	s.clients = map[netip.Addr]bool{}
	return string(s.snapshot())
}

func TestReplay(t *testing.T) {
	for seed := range uint64(30) {
		want, journal, _ := busy(seed, 200)
		got := newState()
		if n := got.replay(journal); n != len(journal) {
			t.Fatalf("seed %d: replay stops at %d of %d", seed, n, len(journal))
		}
		same(t, got, want)
		again := newState()
		if snapshot := want.snapshot(); again.replay(snapshot) != len(snapshot) {
			t.Fatalf("seed %d: its own snapshot can't be read", seed)
		}
		same(t, again, want)
	}
}

// TestTornJournal cuts and spoils a journal at every place: what is before is
// kept, and a server comes up and says what it lost.
func TestTornJournal(t *testing.T) {
	_, journal, ends := busy(3, 40)
	intact := func(n int) (records, at int) {
		for _, end := range ends {
			if end <= n {
				records, at = records+1, end
			}
		}
		return records, at
	}
	for cut := range len(journal) {
		_, at := intact(cut)
		if got := newState().replay(journal[:cut]); got != at {
			t.Fatalf("cut at %d: %d bytes kept, want %d", cut, got, at)
		}
		spoiled := bytes.Clone(journal)
		spoiled[cut] ^= 0x40
		if got := newState().replay(spoiled); got != at {
			t.Fatalf("spoiled at %d: %d bytes kept, want %d", cut, got, at)
		}
	}

	path := filepath.Join(t.TempDir(), "locks")
	cut := len(journal) - 3
	if err := os.WriteFile(path, journal[:cut], 0o600); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	j, s, err := openJournal(path, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	_, at := intact(cut)
	want := newState()
	want.replay(journal[:at])
	same(t, s, want)
	if !strings.Contains(said.String(), "damaged") {
		t.Errorf("it lost records and said %q", said.String())
	}
	if copied, err := os.ReadFile(path + ".damaged"); err != nil || !bytes.Equal(copied, journal[:cut]) {
		t.Errorf("the damaged journal is not kept: %v", err)
	}
	// The next writer starts from a sound file.
	x := entry{kind: opLock, file: "new", lock: lock{owner: owner{clientA, 9}, span: span{0, 0}, confirmed: true}}
	if err := j.write(s, true, x); err != nil {
		t.Fatal(err)
	}
	s.apply(x)
	j.Close()
	_, again, err := openJournal(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	same(t, again, s)
}

func TestCompaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "locks")
	j, s, err := openJournal(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for i := range 20_000 {
		x := entry{kind: opLock, file: "f", lock: lock{owner: owner{clientA, 1}, span: span{0, 0}, exclusive: i%2 == 0, confirmed: true}}
		if err := j.write(s, false, x); err != nil {
			t.Fatal(err)
		}
		s.apply(x)
	}
	if info, err := os.Stat(path); err != nil || info.Size() > compactAt+4096 {
		t.Errorf("the journal of one lock has %d bytes (%v)", info.Size(), err)
	}
	_, again, err := openJournal(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	same(t, again, s)
}

func FuzzReplay(f *testing.F) {
	_, journal, _ := busy(1, 30)
	f.Add(journal)
	f.Fuzz(func(t *testing.T, journal []byte) {
		s := newState()
		n := s.replay(journal)
		if n > len(journal) {
			t.Fatalf("%d of %d bytes read", n, len(journal))
		}
		if snapshot := s.snapshot(); newState().replay(snapshot) != len(snapshot) {
			t.Fatal("what was read can't be written")
		}
	})
}
