package nlm

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

var (
	clientA = netip.MustParseAddr("10.0.0.1")
	clientB = netip.MustParseAddr("10.0.0.2")
)

// naive is the same table, byte by byte: who holds what on each of a few bytes,
// the last of which stands for all the rest of the file.
type naive [size + 1]map[owner]bool // to exclusive

const size = 24

func (n *naive) set(o owner, s span, lock, exclusive bool) {
	for i := s.start; i <= s.end && i <= size; i++ {
		if n[i] == nil {
			n[i] = map[owner]bool{}
		}
		delete(n[i], o)
		if lock {
			n[i][o] = exclusive
		}
	}
}

func (n *naive) conflict(o owner, s span, exclusive bool) bool {
	for i := s.start; i <= s.end && i <= size; i++ {
		for other, ex := range n[i] {
			if other != o && (ex || exclusive) {
				return true
			}
		}
	}
	return false
}

func TestRangesAgainstBytes(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		tab := newTable()
		var model naive
		for step := range 150 {
			o := owner{[]netip.Addr{clientA, clientB}[rng.IntN(2)], int32(rng.IntN(2))}
			s, _ := newSpan(rng.Uint64N(size), rng.Uint64N(6)) // length 0 is to the end
			if s.end < maxOffset && s.end >= size {
				s.end = size - 1
			}
			l := lock{owner: o, span: s, exclusive: rng.IntN(2) == 0, confirmed: true}
			if got, want := tab.conflict("f", l) != nil, model.conflict(o, s, l.exclusive); got != want {
				t.Fatalf("seed %d step %d: conflict of %+v is %t, want %t: %+v", seed, step, l, got, want, tab.files["f"])
			}
			switch {
			case rng.IntN(3) == 0:
				tab.unset("f", o, s)
				model.set(o, s, false, false)
			case tab.conflict("f", l) == nil:
				tab.set("f", l)
				model.set(o, s, true, l.exclusive)
			}
			check(t, tab, &model)
		}
	}
}

// check compares the tables and looks whether the ranges are in their order, as
// few as can be, and counted.
func check(t *testing.T, tab *table, model *naive) {
	t.Helper()
	f := tab.files["f"]
	if f == nil {
		f = &file{}
	}
	count := map[netip.Addr]int{}
	for i, l := range f.locks {
		count[l.client]++
		if i > 0 && f.locks[i-1].start > l.start {
			t.Fatalf("out of order: %+v", f.locks)
		}
		for j, m := range f.locks {
			if i != j && l.owner == m.owner && (l.overlaps(m.span) || l.exclusive == m.exclusive && l.end+1 == m.start) {
				t.Fatalf("two ranges that should be one: %+v", f.locks)
			}
		}
	}
	for _, c := range []netip.Addr{clientA, clientB} {
		if tab.held[c] != count[c] {
			t.Fatalf("%s holds %d, counted %d", c, count[c], tab.held[c])
		}
	}
	for i := range model {
		have := map[owner]bool{}
		for _, l := range f.locks {
			if l.overlaps(span{uint64(i), uint64(i)}) {
				have[l.owner] = l.exclusive
			}
		}
		if len(have) != len(model[i]) {
			t.Fatalf("byte %d: %v, want %v", i, have, model[i])
		}
		for o, ex := range model[i] {
			if got, there := have[o]; !there || got != ex {
				t.Fatalf("byte %d: %v, want %v", i, have, model[i])
			}
		}
	}
}

func TestSpan(t *testing.T) {
	for _, tc := range []struct {
		offset, length uint64
		want           span
		ok             bool
	}{
		{0, 0, span{0, maxOffset}, true},
		{5, 1, span{5, 5}, true},
		{5, 1 << 63, span{5, maxOffset}, true},
		{5, ^uint64(0), span{5, maxOffset}, true},
		{maxOffset, 1, span{maxOffset, maxOffset}, true},
		{maxOffset + 1, 1, span{}, false},
	} {
		if got, ok := newSpan(tc.offset, tc.length); got != tc.want || ok != tc.ok {
			t.Errorf("newSpan(%d, %d) = %v, %t, want %v, %t", tc.offset, tc.length, got, ok, tc.want, tc.ok)
		}
	}
}

func TestDeadlock(t *testing.T) {
	a, b, c := owner{clientA, 1}, owner{clientB, 1}, owner{clientB, 2}
	ex := func(o owner, at uint64) lock { return lock{owner: o, span: span{at, at}, exclusive: true} }
	tab := newTable()
	tab.set("f", ex(a, 0))
	tab.set("g", ex(b, 0))
	tab.set("f", ex(c, 5))
	if tab.deadlock("g", ex(a, 0)) {
		t.Error("a waits for b, who waits for nobody: no deadlock")
	}
	tab.wait(&waiter{file: "g", want: ex(a, 0)}) // a waits for b
	tab.wait(&waiter{file: "f", want: ex(b, 5)}) // b waits for c
	if !tab.deadlock("f", ex(c, 0)) {
		t.Error("c would wait for a, a for b, b for c: not seen")
	}
	if tab.deadlock("f", lock{owner: c, span: span{9, 9}, exclusive: true}) {
		t.Error("nobody has what c wants")
	}
	tab.forget(tab.find("f", ex(b, 5)))
	if tab.deadlock("f", ex(c, 0)) {
		t.Error("b has given up: no deadlock")
	}
}

func TestOrderOfGrants(t *testing.T) {
	tab := newTable()
	want := func(svid int32, exclusive bool) lock {
		return lock{owner: owner{clientA, svid}, span: span{0, 9}, exclusive: exclusive}
	}
	tab.set("f", want(1, true))
	for svid := int32(2); svid < 6; svid++ {
		tab.wait(&waiter{file: "f", want: want(svid, svid%2 == 0)})
	}
	tab.unset("f", want(1, true).owner, span{0, 9})
	var order []int32
	for {
		w := tab.grantable("f")
		if w == nil {
			break
		}
		tab.grant(w)
		order = append(order, w.want.svid)
		tab.forget(w)
		if w.want.exclusive {
			tab.unset("f", w.want.owner, w.want.span)
		}
	}
	if !slices.Equal(order, []int32{2, 3, 5}) { // 4 waits for the readers 3 and 5
		t.Errorf("granted in the order %v", order)
	}
}
