package nfs

import (
	"bytes"
	"testing"
)

func TestSmoke(t *testing.T) {
	s, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	h, a, st := c.create(c.root, "file", createUnchecked, set{mode: to(uint32(0o4755))})
	if st != ok || a.mode != 0o4755 || a.typ != 1 {
		t.Fatalf("CREATE: %d %+v", st, a)
	}
	if _, n, _, st := c.write(h, 0, []byte("hello"), unstable); n != 5 || st != ok {
		t.Fatalf("WRITE: %d %d", n, st)
	}
	data, eof, st := c.read(h, 0, 100)
	if !bytes.Equal(data, []byte("hello")) || !eof || st != ok {
		t.Fatalf("READ: %q %v %d", data, eof, st)
	}
	for _, plus := range []bool{false, true} {
		if l := c.listAll(c.root, 4096, plus); len(l) != 3 {
			t.Fatalf("%v", l)
		}
	}
	t.Logf("%+v", s.Stats())
}
