package nfs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestBirths(t *testing.T) {
	var b births
	x := &export{}
	now := time.Now()
	old, young := birth{x, 1, now.Unix() - 100, 5}, birth{x, 2, now.Unix(), 0}
	b.add(old, []byte("old"))
	b.add(young, []byte("young"))
	if got := b.get(old); string(got) != "old" {
		t.Errorf("a known file: %q", got)
	}
	for what, k := range map[string]birth{
		"a file that is too young":          young,
		"the number with another birth":     {x, 1, old.sec, 6},
		"the number in another file system": {&export{}, 1, old.sec, 5},
	} {
		if got := b.get(k); got != nil {
			t.Errorf("%s: %q", what, got)
		}
	}
	for i := range 3 * maxBirths {
		b.add(birth{x, uint64(10 + i), 1, 1}, nil)
		if i%1000 == 0 && b.get(old) == nil {
			t.Fatalf("a file that is asked for was forgotten after %d others", i)
		}
	}
	if n := len(b.now) + len(b.old); n > 2*maxBirths {
		t.Errorf("%d files remembered", n)
	}
}

// TestListingHandles: READDIRPLUS gives the handles and attributes that LOOKUP
// gives, for files old enough to be remembered too, and after names have changed
// hands.
func TestListingHandles(t *testing.T) {
	dir := t.TempDir()
	s, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	for i := range 20 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := connect(t, addr, "/", 0, 0)
	check := func() {
		t.Helper()
		for _, l := range c.listAll(c.root, 8<<10, true) {
			h, st := c.lookup(c.root, l.name)
			if st != ok || !bytes.Equal(h, l.handle) {
				t.Errorf("%s: listed with handle %x, looked up %x (%d)", l.name, l.handle, h, st)
			}
			if a, st := c.getattr(l.handle); st != ok || l.attrs == nil || a != *l.attrs {
				t.Errorf("%s: listed with %+v, has %+v (%d)", l.name, l.attrs, a, st)
			}
		}
	}
	check()
	// As if they had been born long ago.
	for i := range 20 {
		var st unix.Stat_t
		k, known, err := statBirth(s.exports[0], unix.AT_FDCWD, filepath.Join(dir, fmt.Sprint(i)), &st)
		if err != nil || !known {
			t.Skipf("no time of birth: %v", err)
		}
		h, _ := c.lookup(c.root, fmt.Sprint(i))
		s.births.mu.Lock()
		s.births.put(k, string(h))
		s.births.mu.Unlock()
	}
	check()
	for i := range 10 {
		if err := os.Rename(filepath.Join(dir, fmt.Sprint(i)), filepath.Join(dir, fmt.Sprint(i+10))); err != nil {
			t.Fatal(err)
		}
	}
	check()
}
