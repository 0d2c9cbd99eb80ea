package nfs

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDirectoryUnderChange: names that are there all the time are listed exactly
// once, whatever happens around them.
func TestDirectoryUnderChange(t *testing.T) {
	const stable = 5000
	dir := t.TempDir()
	for i := range stable {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("stable%05d", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, addr, stop := serve(t, Export{Path: "/", Dir: dir})
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		c := connect(t, addr, "/", 0, 0)
		for i := 0; ; i++ {
			select {
			case <-quit:
				return
			default:
			}
			c.create(c.root, fmt.Sprintf("coming%d", i), createUnchecked, set{})
			c.rename(c.root, fmt.Sprintf("coming%d", i), c.root, fmt.Sprintf("renamed%d", i))
			if i >= 100 {
				c.remove(c.root, fmt.Sprintf("renamed%d", i-100))
			}
		}
	})
	c := connect(t, addr, "/", 0, 0)
	for _, tt := range []struct {
		size uint32
		plus bool
	}{{1024, false}, {32 << 10, false}, {2048, true}, {64 << 10, true}, {1 << 20, true}} {
		seen := map[string]int{}
		for _, l := range c.listAll(c.root, tt.size, tt.plus) {
			seen[l.name]++
			if tt.plus && l.attrs != nil && l.attrs.fileid != l.fileid {
				t.Errorf("%s: file id %d, attributes of %d", l.name, l.fileid, l.attrs.fileid)
			}
			if tt.plus && l.name[0] == 's' && (l.attrs == nil || l.handle == nil) {
				t.Errorf("%s: no attributes or no handle", l.name)
			}
		}
		missing := 0
		for i := range stable {
			if seen[fmt.Sprintf("stable%05d", i)] != 1 {
				missing++
			}
		}
		if missing > 0 || seen["."] != 1 || seen[".."] != 1 {
			t.Errorf("%d bytes, plus %v: %d of %d names not listed exactly once", tt.size, tt.plus, missing, stable)
		}
	}
	// A cookie is good after names around it went, and after a restart.
	part, _, _ := c.list(c.root, 0, 8192, false)
	cookie := part[len(part)-1].cookie
	close(quit)
	wg.Wait()
	before, _, _ := c.list(c.root, cookie, 1<<20, false)
	stop()
	_, addr, _ = serve(t, Export{Path: "/", Dir: dir})
	c = connect(t, addr, "/", 0, 0)
	after, _, _ := c.list(c.root, cookie, 1<<20, false)
	if len(before) == 0 || len(before) != len(after) || before[0].name != after[0].name {
		t.Errorf("from one cookie on %d entries, after a restart %d", len(before), len(after))
	}
	// Handles of the listing are the file's.
	plus, _, _ := c.list(c.root, 0, 4096, true)
	for _, l := range plus {
		if h, st := c.lookup(c.root, l.name); st != ok || string(h) != string(l.handle) {
			t.Errorf("%s has another handle in the listing (LOOKUP %d)", l.name, st)
		}
	}
	if _, _, st := c.list(c.root, 1<<63, 4096, false); st != errBadCookie {
		t.Errorf("a cookie that never was: %d", st)
	}
	if _, _, st := c.list(c.root, 0, 60, true); st != errTooSmall {
		t.Errorf("a reply too small for an entry: %d", st)
	}
	if _, _, st := c.list(plus[len(plus)-1].handle, 0, 4096, false); st != errNotDir {
		t.Errorf("listing of a file: %d", st)
	}
}

// TestWcc: with several clients changing one file, the "before" of every change
// is the "after" of exactly one other. Otherwise a client would take another's
// change for its own and keep stale data.
func TestWcc(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	h, _, _ := c.create(c.root, "f", createGuarded, set{mode: to(uint32(0o666))})
	c.setattr(h, set{uid: to(uint32(1000)), mtime: &unix.Timespec{Sec: 1}})
	const clients, rounds = 4, 100
	var mu sync.Mutex
	var changes [][2]int64 // mtime before, after
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			// By root and by users: with and without a change of thread.
			c := connect(t, addr, "/", uint32(i%2*1000), 0)
			for r := range rounds {
				mtime := &unix.Timespec{Sec: int64(1000 + i*rounds + r)}
				_, d := c.nfs(2, func(e *buffer) { e.opaque(h); set{mtime: mtime}.encode(e); e.boolean(false) })
				w := d.wcc()
				if !w.pre || w.post == nil || w.post.mtime != *mtime {
					t.Errorf("wcc data %+v", w)
					return
				}
				mu.Lock()
				changes = append(changes, [2]int64{w.mtime.Sec, w.post.mtime.Sec})
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	next := map[int64]int64{}
	for _, ch := range changes {
		if _, twice := next[ch[0]]; twice {
			t.Fatalf("two changes start at mtime %d", ch[0])
		}
		next[ch[0]] = ch[1]
	}
	n := 0
	for at := int64(1); ; n++ {
		to, more := next[at]
		if !more {
			break
		}
		at = to
	}
	if n != clients*rounds {
		t.Errorf("the chain of changes has %d links of %d", n, clients*rounds)
	}
}

// TestEviction: with a cache far smaller than the files in use all still works.
func TestEviction(t *testing.T) {
	dir := t.TempDir()
	s, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	for i := range s.files.parts {
		s.files.parts[i].max = 1
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			c := connect(t, addr, "/", 0, 0)
			d, _, _ := c.mkdir(c.root, fmt.Sprint(i), 0o755)
			var handles [][]byte
			for j := range 50 {
				h, _, st := c.create(d, fmt.Sprint(j), createGuarded, set{})
				if st != ok {
					t.Errorf("CREATE: %d", st)
				}
				handles = append(handles, h)
				c.write(h, 0, fmt.Appendf(nil, "%d/%d", i, j), unstable)
			}
			for j, h := range handles {
				if data, _, st := c.read(h, 0, 100); string(data) != fmt.Sprintf("%d/%d", i, j) || st != ok {
					t.Errorf("READ: %q %d", data, st)
				}
			}
		})
	}
	wg.Wait()
	if n := s.Stats().CachedFiles; n > 8+4*4 {
		t.Errorf("%d files cached", n)
	}
	s.files.evictIdle()
	if n := s.Stats().CachedFiles; n != 1 {
		t.Errorf("%d files cached after closing all idle ones, want the root", n)
	}
}
