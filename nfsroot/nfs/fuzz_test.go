package nfs

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// FuzzProcedures calls every procedure with arbitrary arguments, as root and as
// a user. The first handle in the arguments is replaced by a good one where
// there is one, for a fuzzer can't forge it.
func FuzzProcedures(f *testing.F) {
	outer := f.TempDir()
	dir := filepath.Join(outer, "export")
	os.MkdirAll(filepath.Join(dir, "sub"), 0o777)
	os.WriteFile(filepath.Join(dir, "file"), []byte("data"), 0o666)
	os.Symlink("file", filepath.Join(dir, "link"))
	unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666)
	s, err := New(Config{Exports: []Export{testExport(f, dir)}, HandleKey: testKey})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	x := s.exports[0]
	var handles [][]byte
	for _, name := range []string{"", "sub", "file", "link", "fifo"} {
		h, err := handleAt(unix.AT_FDCWD, filepath.Join(dir, name))
		if err != nil {
			f.Fatal(err)
		}
		g := s.files.get(x, h, 0)
		handles = append(handles, g.handle())
		defer g.release() // lives as long as the target: the seeds' files stay
	}
	seed := func(proc uint32, which byte, args func(e *buffer)) {
		e := &buffer{}
		args(e)
		f.Add(proc, which, e.b)
	}
	name := func(e *buffer) { e.str("file") }
	seed(1, 0, func(e *buffer) {})
	seed(2, 2, func(e *buffer) {
		set{mode: to(uint32(0o7777)), size: to(uint64(1 << 40)), mtime: &unix.Timespec{Sec: 5, Nsec: 5}}.encode(e)
		e.boolean(true)
		e.u64(0)
	})
	seed(3, 0, name)
	seed(3, 1, func(e *buffer) { e.str("..") })
	seed(4, 2, func(e *buffer) { e.u32(0x3f) })
	seed(5, 3, func(e *buffer) {})
	seed(6, 2, func(e *buffer) { e.u64(0); e.u32(100) })
	seed(6, 4, func(e *buffer) { e.u64(0); e.u32(100) })
	seed(7, 2, func(e *buffer) { e.u64(1); e.u32(3); e.u32(2); e.str("abc") })
	seed(8, 0, func(e *buffer) { e.str("new"); e.u32(createUnchecked); set{size: to(uint64(0))}.encode(e) })
	seed(8, 0, func(e *buffer) { e.str("excl"); e.u32(createExclusive); e.u64(1) })
	seed(9, 0, func(e *buffer) { e.str("d"); set{}.encode(e) })
	seed(10, 0, func(e *buffer) { e.str("l"); set{}.encode(e); e.str("../../../etc/passwd") })
	seed(11, 0, func(e *buffer) { e.str("n"); e.u32(7); set{}.encode(e) })
	seed(11, 0, func(e *buffer) { e.str("c"); e.u32(4); set{}.encode(e); e.u64(0) })
	seed(12, 1, name)
	seed(13, 1, name)
	seed(14, 0, func(e *buffer) { e.str("new"); e.opaque(handles[1]); e.str("x") })
	seed(15, 2, func(e *buffer) { e.opaque(handles[1]); e.str("hard") })
	seed(16, 0, func(e *buffer) { e.u64(0); e.u64(0); e.u32(4096) })
	seed(17, 0, func(e *buffer) { e.u64(0); e.u64(0); e.u32(1 << 31); e.u32(1<<32 - 1) })
	seed(18, 0, func(e *buffer) {})
	seed(19, 0, func(e *buffer) {})
	seed(20, 0, func(e *buffer) {})
	seed(21, 2, func(e *buffer) { e.u64(0); e.u32(0) })
	seed(101, 255, func(e *buffer) { e.str("/sub") })
	seed(105, 255, func(e *buffer) {})

	xid := uint32(0)
	f.Fuzz(func(t *testing.T, proc uint32, which byte, args []byte) {
		in := &buffer{}
		if int(which) < 2*len(handles) {
			in.opaque(handles[int(which)%len(handles)])
		}
		in.b = append(in.b, args...)
		xid++
		h := callHeader{xid: xid, rpcvers: rpcVersion, prog: progNFS, vers: 3, proc: proc % 23, flavor: flavorSys}
		if proc >= 100 {
			h.prog, h.proc = progMount, proc%7
		}
		if int(which) >= len(handles) {
			h.id = identity{uid: 1000, gid: 1000}
		}
		e := newBuffer(0)
		defer e.free()
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.answer(new(call), netip.Addr{}, &h, &decoder{b: in.b}, e)
			finish(e.b)
		}()
		select {
		case <-done:
		case <-time.After(20 * time.Second): // a deadlock, or the open of a FIFO
			t.Fatal("the call does not end")
		}
		if n := s.count.panics.Load(); n > 0 {
			t.Fatal("the procedure panicked")
		}
		if len(e.b)%4 != 0 || len(e.b) > maxRecord+smallBuffer {
			t.Errorf("a reply of %d bytes", len(e.b))
		}
		if names, _ := os.ReadDir(outer); len(names) != 1 {
			t.Fatalf("outside the export there is now %v", names)
		}
	})
}
