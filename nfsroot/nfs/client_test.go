package nfs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// testKey signs the handles of all test servers, so that one can stand in for
// another that was stopped.
var testKey = []byte("0123456789abcdef0123456789abcdef")

// kept says that this is no privileged process: the server under test serves
// directories that are kept. Root runs all tests again in such a process (see
// TestWithoutPrivilege).
func kept() bool { return os.Getuid() != 0 }

// needRoot skips tests of what only the server of root's trees has.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: open_by_handle_at and setfsuid")
	}
}

// serve runs a server for the exports until the test ends, or stop is called,
// and returns the address of its listener.
func serve(t testing.TB, exports ...Export) (s *Server, addr string, stop func()) {
	t.Helper()
	for i := range exports {
		if kept() {
			exports[i].Kept = true
		}
		if exports[i].Kept {
			markTop(t, exports[i].Dir)
		}
	}
	s, err := New(Config{Exports: exports, HandleKey: testKey})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		s.Close()
	}
	t.Cleanup(stop)
	return s, ln.Addr().String(), stop
}

// testExport is an export of dir with the back end under test.
func testExport(t testing.TB, dir string) Export {
	if kept() {
		markTop(t, dir)
	}
	return Export{Path: "/", Dir: dir, Kept: kept()}
}

// markTop makes a directory the top of a kept tree, as root's.
func markTop(t testing.TB, dir string) {
	t.Helper()
	if marked, err := meta.Marked(dir); err != nil || marked {
		return
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	if err := meta.WritePath(dir, &st, meta.Attr{Mode: unix.S_IFDIR | 0o755}); err != nil {
		t.Fatal(err)
	}
}

// client is one connection with one identity.
type client struct {
	t    testing.TB
	nc   net.Conn
	r    *bufio.Reader
	id   identity
	xid  uint32
	root []byte
	last *buffer // the reply before
}

func dial(t testing.TB, addr string, uid, gid uint32, groups ...uint32) *client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	c := &client{t: t, nc: nc, r: bufio.NewReader(nc), id: identity{uid: uid, gid: gid}}
	for _, g := range groups {
		c.id.groups += string(binary.NativeEndian.AppendUint32(nil, g))
	}
	return c
}

// connect is dial followed by mounting path.
func connect(t testing.TB, addr, path string, uid, gid uint32, groups ...uint32) *client {
	t.Helper()
	c := dial(t, addr, uid, gid, groups...)
	h, st := c.mount(path)
	if st != ok {
		t.Fatalf("MNT %s: status %d", path, st)
	}
	c.root = h
	return c
}

// request makes a whole record of a call.
func (c *client) request(prog, vers, proc uint32, args []byte) []byte {
	c.xid++
	e := &buffer{b: make([]byte, 4)}
	for _, v := range []uint32{c.xid, msgCall, rpcVersion, prog, vers, proc} {
		e.u32(v)
	}
	cred := &buffer{}
	cred.u32(7)
	cred.str("node")
	cred.u32(c.id.uid)
	cred.u32(c.id.gid)
	cred.u32(uint32(len(c.id.groups) / 4))
	for i := 0; i < len(c.id.groups); i += 4 {
		cred.u32(binary.NativeEndian.Uint32([]byte(c.id.groups[i:])))
	}
	e.u32(flavorSys)
	e.opaque(cred.b)
	e.u32(flavorNone)
	e.u32(0)
	e.b = append(e.b, args...)
	finish(e.b)
	return e.b
}

// reply reads the next record. It is good until the one after it is read, which
// spares the benchmark a copy; handles, which live longer, are copied.
func (c *client) reply() []byte {
	c.t.Helper()
	rec, err := readRecord(c.r)
	if err != nil {
		c.t.Fatalf("reading a reply: %v", err)
	}
	if c.last != nil {
		c.last.free()
	}
	c.last = rec
	return rec.b
}

// call sends a call and returns its accept status and results.
func (c *client) call(prog, vers, proc uint32, args []byte) (uint32, *decoder) {
	c.t.Helper()
	if _, err := c.nc.Write(c.request(prog, vers, proc, args)); err != nil {
		c.t.Fatal(err)
	}
	return c.accepted(c.reply())
}

func (c *client) accepted(rec []byte) (uint32, *decoder) {
	c.t.Helper()
	d := &decoder{b: rec}
	if xid := d.u32(); xid != c.xid {
		c.t.Fatalf("reply has xid %d, want %d", xid, c.xid)
	}
	if d.u32() != msgReply || d.u32() != replyAccepted || d.u32() != flavorNone || d.u32() != 0 {
		c.t.Fatalf("call was denied: % x", rec)
	}
	st := d.u32()
	return st, d
}

// nfs calls an NFS procedure and returns its status.
func (c *client) nfs(proc uint32, args func(e *buffer)) (status, *decoder) {
	c.t.Helper()
	e := &buffer{}
	args(e)
	acc, d := c.call(progNFS, 3, proc, e.b)
	if acc != acceptSuccess {
		c.t.Fatalf("%s: accept status %d", nfsNames[proc], acc)
	}
	return status(d.u32()), d
}

func (c *client) mount(path string) ([]byte, status) {
	c.t.Helper()
	e := &buffer{}
	e.str(path)
	acc, d := c.call(progMount, 3, 1, e.b)
	if acc != acceptSuccess {
		c.t.Fatalf("MNT: accept status %d", acc)
	}
	st := status(d.u32())
	if st != ok {
		return nil, st
	}
	return bytes.Clone(d.opaque(maxHandle)), st
}

// attrs is a decoded fattr3.
type attrs struct {
	typ, mode, nlink, uid, gid uint32
	size, used                 uint64
	major, minor               uint32
	fsid, fileid               uint64
	atime, mtime, ctime        unix.Timespec
}

func (d *decoder) attrs() (a attrs) {
	a.typ, a.mode, a.nlink, a.uid, a.gid = d.u32(), d.u32(), d.u32(), d.u32(), d.u32()
	a.size, a.used, a.major, a.minor = d.u64(), d.u64(), d.u32(), d.u32()
	a.fsid, a.fileid = d.u64(), d.u64()
	a.atime, a.mtime, a.ctime = d.time3(), d.time3(), d.time3()
	return a
}

// maybeAttrs decodes a post_op_attr.
func (d *decoder) maybeAttrs() *attrs {
	if !d.boolean() {
		return nil
	}
	a := d.attrs()
	return &a
}

// wcc decodes a wcc_data: what is said of before, and the attributes after.
type wccReply struct {
	pre          bool
	size         uint64
	mtime, ctime unix.Timespec
	post         *attrs
}

func (d *decoder) wcc() (w wccReply) {
	if w.pre = d.boolean(); w.pre {
		w.size, w.mtime, w.ctime = d.u64(), d.time3(), d.time3()
	}
	w.post = d.maybeAttrs()
	return w
}

func (c *client) getattr(h []byte) (attrs, status) {
	c.t.Helper()
	st, d := c.nfs(1, func(e *buffer) { e.opaque(h) })
	if st != ok {
		return attrs{}, st
	}
	return d.attrs(), st
}

func (c *client) lookup(dir []byte, name string) ([]byte, status) {
	c.t.Helper()
	st, d := c.nfs(3, func(e *buffer) { e.opaque(dir); e.str(name) })
	if st != ok {
		return nil, st
	}
	return bytes.Clone(d.opaque(maxHandle)), st
}

// walk looks up a path of names that must exist.
func (c *client) walk(names ...string) []byte {
	c.t.Helper()
	h := c.root
	for _, name := range names {
		next, st := c.lookup(h, name)
		if st != ok {
			c.t.Fatalf("LOOKUP %s: status %d", name, st)
		}
		h = next
	}
	return h
}

// set is a sattr3 in the making: nil fields stay as they are.
type set struct {
	mode, uid, gid *uint32
	size           *uint64
	atime, mtime   *unix.Timespec
	now            bool // both times from the server
}

func to[T any](v T) *T { return &v }

func (s set) encode(e *buffer) {
	for _, p := range []*uint32{s.mode, s.uid, s.gid} {
		e.boolean(p != nil)
		if p != nil {
			e.u32(*p)
		}
	}
	e.boolean(s.size != nil)
	if s.size != nil {
		e.u64(*s.size)
	}
	for _, t := range []*unix.Timespec{s.atime, s.mtime} {
		switch {
		case s.now:
			e.u32(1)
		case t != nil:
			e.u32(2)
			e.u32(uint32(t.Sec))
			e.u32(uint32(t.Nsec))
		default:
			e.u32(0)
		}
	}
}

func (c *client) setattr(h []byte, s set) status {
	c.t.Helper()
	st, _ := c.nfs(2, func(e *buffer) { e.opaque(h); s.encode(e); e.boolean(false) })
	return st
}

// made decodes the result of CREATE, MKDIR, SYMLINK and MKNOD.
func (c *client) made(st status, d *decoder) ([]byte, attrs, status) {
	c.t.Helper()
	if st != ok {
		return nil, attrs{}, st
	}
	if !d.boolean() {
		c.t.Fatal("no handle for a new file")
	}
	h := bytes.Clone(d.opaque(maxHandle))
	a := d.maybeAttrs()
	if a == nil {
		c.t.Fatal("no attributes for a new file")
	}
	if w := d.wcc(); !w.pre || w.post == nil || d.bad || len(d.b) != 0 {
		c.t.Fatalf("wcc data of the directory: %+v, %d bytes left", w, len(d.b))
	}
	return h, *a, st
}

func (c *client) create(dir []byte, name string, how uint32, s set) ([]byte, attrs, status) {
	c.t.Helper()
	st, d := c.nfs(8, func(e *buffer) { e.opaque(dir); e.str(name); e.u32(how); s.encode(e) })
	return c.made(st, d)
}

func (c *client) exclusive(dir []byte, name string, verf uint64) ([]byte, attrs, status) {
	c.t.Helper()
	st, d := c.nfs(8, func(e *buffer) { e.opaque(dir); e.str(name); e.u32(createExclusive); e.u64(verf) })
	return c.made(st, d)
}

func (c *client) mkdir(dir []byte, name string, mode uint32) ([]byte, attrs, status) {
	c.t.Helper()
	st, d := c.nfs(9, func(e *buffer) { e.opaque(dir); e.str(name); set{mode: &mode}.encode(e) })
	return c.made(st, d)
}

func (c *client) symlink(dir []byte, name, target string) ([]byte, attrs, status) {
	c.t.Helper()
	st, d := c.nfs(10, func(e *buffer) { e.opaque(dir); e.str(name); set{}.encode(e); e.str(target) })
	return c.made(st, d)
}

func (c *client) mknod(dir []byte, name string, typ, mode, major, minor uint32) ([]byte, attrs, status) {
	c.t.Helper()
	st, d := c.nfs(11, func(e *buffer) {
		e.opaque(dir)
		e.str(name)
		e.u32(typ)
		set{mode: &mode}.encode(e)
		if typ == 3 || typ == 4 {
			e.u32(major)
			e.u32(minor)
		}
	})
	return c.made(st, d)
}

func (c *client) remove(dir []byte, name string) status {
	c.t.Helper()
	st, _ := c.nfs(12, func(e *buffer) { e.opaque(dir); e.str(name) })
	return st
}

func (c *client) rmdir(dir []byte, name string) status {
	c.t.Helper()
	st, _ := c.nfs(13, func(e *buffer) { e.opaque(dir); e.str(name) })
	return st
}

func (c *client) rename(from []byte, fromName string, to []byte, toName string) status {
	c.t.Helper()
	st, _ := c.nfs(14, func(e *buffer) { e.opaque(from); e.str(fromName); e.opaque(to); e.str(toName) })
	return st
}

func (c *client) link(h, dir []byte, name string) status {
	c.t.Helper()
	st, _ := c.nfs(15, func(e *buffer) { e.opaque(h); e.opaque(dir); e.str(name) })
	return st
}

func (c *client) access(h []byte, want uint32) uint32 {
	c.t.Helper()
	st, d := c.nfs(4, func(e *buffer) { e.opaque(h); e.u32(want) })
	if st != ok {
		c.t.Fatalf("ACCESS: status %d", st)
	}
	d.maybeAttrs()
	return d.u32()
}

func (c *client) read(h []byte, off uint64, count uint32) (data []byte, eof bool, st status) {
	c.t.Helper()
	st, d := c.nfs(6, func(e *buffer) { e.opaque(h); e.u64(off); e.u32(count) })
	if st != ok {
		return nil, false, st
	}
	if d.maybeAttrs() == nil {
		c.t.Fatal("READ without attributes")
	}
	n := d.u32()
	eof = d.boolean()
	data = d.opaque(maxIO)
	if int(n) != len(data) || d.bad || len(d.b) != 0 {
		c.t.Fatalf("READ: count %d, %d bytes, %d bytes left over", n, len(data), len(d.b))
	}
	return data, eof, ok
}

func (c *client) write(h []byte, off uint64, data []byte, stable uint32) (w wccReply, n uint32, verf uint64, st status) {
	c.t.Helper()
	st, d := c.nfs(7, func(e *buffer) {
		e.opaque(h)
		e.u64(off)
		e.u32(uint32(len(data)))
		e.u32(stable)
		e.opaque(data)
	})
	w = d.wcc()
	if st != ok {
		return w, 0, 0, st
	}
	n = d.u32()
	if how := d.u32(); how < stable {
		c.t.Fatalf("WRITE as stable as %d was done as %d", stable, how)
	}
	return w, n, d.u64(), ok
}

func (c *client) commit(h []byte) (uint64, status) {
	c.t.Helper()
	st, d := c.nfs(21, func(e *buffer) { e.opaque(h); e.u64(0); e.u32(0) })
	d.wcc()
	if st != ok {
		return 0, st
	}
	return d.u64(), ok
}

// listed is a directory entry as a client sees it.
type listed struct {
	name   string
	fileid uint64
	cookie uint64
	attrs  *attrs
	handle []byte
}

// list reads one reply of READDIR or, with plus, READDIRPLUS.
func (c *client) list(dir []byte, cookie uint64, size uint32, plus bool) (out []listed, eof bool, st status) {
	c.t.Helper()
	proc := uint32(procReadDir)
	if plus {
		proc = procReadDirPlus
	}
	st, d := c.nfs(proc, func(e *buffer) {
		e.opaque(dir)
		e.u64(cookie)
		e.u64(0)
		e.u32(size)
		if plus {
			e.u32(size)
		}
	})
	all := len(d.b)
	if d.maybeAttrs(); st != ok {
		return nil, false, st
	}
	d.u64()
	for d.boolean() {
		l := listed{fileid: d.u64(), name: string(d.opaque(255)), cookie: d.u64()}
		if plus {
			l.attrs = d.maybeAttrs()
			if d.boolean() {
				l.handle = bytes.Clone(d.opaque(maxHandle))
			}
		}
		out = append(out, l)
	}
	eof = d.boolean()
	if d.bad || len(d.b) != 0 || uint32(all) > size {
		c.t.Fatalf("directory listing of %d bytes (at most %d), %d bytes left over", all, size, len(d.b))
	}
	return out, eof, ok
}

// listAll reads a whole directory.
func (c *client) listAll(dir []byte, size uint32, plus bool) (out []listed) {
	c.t.Helper()
	cookie := uint64(0)
	for {
		part, eof, st := c.list(dir, cookie, size, plus)
		if st != ok {
			c.t.Fatalf("listing: status %d", st)
		}
		out = append(out, part...)
		if eof {
			return out
		}
		if len(part) == 0 {
			c.t.Fatal("an empty listing that is not the end")
		}
		cookie = part[len(part)-1].cookie
	}
}

// closed waits until the server has closed the connection.
func (c *client) closed() {
	c.t.Helper()
	if _, err := c.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("the connection is still open (%v)", err)
	}
}
