package nfs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUnserved(t *testing.T) {
	s, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	for _, tt := range []struct {
		what             string
		prog, vers, proc uint32
		want             uint32
	}{
		{"NULL", progNFS, 3, 0, acceptSuccess},
		{"MOUNT NULL", progMount, 3, 0, acceptSuccess},
		{"NFS procedure 22", progNFS, 3, 22, acceptProcUnavail},
		{"NFS procedure -1", progNFS, 3, 1<<32 - 1, acceptProcUnavail},
		{"MOUNT procedure 6", progMount, 3, 6, acceptProcUnavail},
		{"NFS 4", progNFS, 4, 0, acceptProgMismatch},
		{"MOUNT 1", progMount, 1, 0, acceptProgMismatch},
		{"NFSACL", 100227, 3, 0, acceptProgUnavail},
		{"GETATTR without arguments", progNFS, 3, 1, acceptGarbageArgs},
		{"WRITE without arguments", progNFS, 3, 7, acceptGarbageArgs},
		{"MNT without arguments", progMount, 3, 1, acceptGarbageArgs},
	} {
		acc, d := c.call(tt.prog, tt.vers, tt.proc, nil)
		if acc != tt.want {
			t.Errorf("%s: accept status %d, want %d", tt.what, acc, tt.want)
		}
		if acc == acceptProgMismatch {
			if low, high := d.u32(), d.u32(); low != 3 || high != 3 {
				t.Errorf("%s: told that versions %d to %d are served", tt.what, low, high)
			}
		}
	}
	if n := s.Stats().Garbage; n != 3 {
		t.Errorf("%d calls counted as garbage, want 3", n)
	}

	// Another RPC version and other kinds of credentials are denied.
	rpc1 := c.request(progNFS, 3, 0, nil)
	binary.BigEndian.PutUint32(rpc1[12:], 1)
	gss := c.request(progNFS, 3, 0, nil)
	binary.BigEndian.PutUint32(gss[28:], 6)
	groups := c.request(progNFS, 3, 0, nil)
	binary.BigEndian.PutUint32(groups[56:], 17) // number of groups: more than there are
	for _, tt := range []struct {
		what   string
		record []byte
		want   []uint32
	}{
		{"RPC version 1", rpc1, []uint32{replyDenied, rejectRPCMismatch, 2, 2}},
		{"RPCSEC_GSS", gss, []uint32{replyDenied, rejectAuthError, authTooWeak}},
		{"too many groups", groups, []uint32{replyDenied, rejectAuthError, authBadCred}},
	} {
		c.nc.Write(tt.record)
		d := &decoder{b: c.reply()}
		d.u32()
		d.u32()
		for i, want := range tt.want {
			if got := d.u32(); got != want {
				t.Errorf("%s: word %d is %d, want %d", tt.what, i, got, want)
			}
		}
	}
}

func TestFragments(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	e := &buffer{}
	e.opaque(c.root)
	rec := c.request(progNFS, 3, 1, e.b)[4:]
	var sent []byte
	for i := 0; i < len(rec); i += 3 {
		frag := rec[i:min(i+3, len(rec))]
		mark := uint32(len(frag))
		if i+3 >= len(rec) {
			mark |= 1 << 31
		}
		sent = binary.BigEndian.AppendUint32(sent, mark)
		sent = append(sent, frag...)
		if i == 0 { // an empty fragment is allowed
			sent = append(sent, 0, 0, 0, 0)
		}
	}
	c.nc.Write(sent)
	acc, d := c.accepted(c.reply())
	if st := status(d.u32()); acc != acceptSuccess || st != ok {
		t.Errorf("GETATTR in fragments: %d %d", acc, st)
	}
}

func TestMalformedRecords(t *testing.T) {
	s, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	good := dial(t, addr, 0, 0).request(progNFS, 3, 0, nil)
	reply := bytes.Clone(good)
	binary.BigEndian.PutUint32(reply[8:], msgReply)
	for i, record := range [][]byte{
		{0xff, 0xff, 0xff, 0xff},
		binary.BigEndian.AppendUint32(nil, 1<<31|maxRecord+1),
		bytes.Repeat([]byte{0, 0, 0, 0}, maxFragments+1),
		{0x80, 0, 0, 0}, // an empty record
		{0x80, 0, 0, 2, 1, 2},
		reply,
		append([]byte{0x80, 0, 0, 20}, good[4:24]...), // cut in the header
		[]byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		c := dial(t, addr, 0, 0)
		c.nc.Write(record)
		c.closed()
		if n := s.Stats().BadRecords; n != uint64(i+1) {
			t.Errorf("record %d: %d counted, want %d", i, n, i+1)
		}
	}
	// A record that breaks off is a lost connection.
	c := dial(t, addr, 0, 0)
	c.nc.Write(good[:20])
	c.nc.(*net.TCPConn).CloseWrite()
	c.closed()
	// And all that has not hurt anybody else.
	connect(t, addr, "/", 0, 0)
}

// TestPipelined: many requests at once on one connection, answered in any order.
func TestPipelined(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	user := connect(t, addr, "/", 1000, 1000)
	h, _, _ := c.create(c.root, "f", createGuarded, set{mode: to(uint32(0o666))})
	const n = 200
	for _, c := range []*client{c, user} {
		waiting := map[uint32]bool{}
		var all []byte
		for i := range n {
			e := &buffer{}
			e.opaque(h)
			if i%2 == 0 {
				all = append(all, c.request(progNFS, 3, 1, e.b)...)
			} else {
				e.u64(uint64(i) * 1000)
				e.u32(1000)
				e.u32(unstable)
				e.opaque(make([]byte, 1000))
				all = append(all, c.request(progNFS, 3, 7, e.b)...)
			}
			waiting[c.xid] = true
		}
		go c.nc.Write(all)
		for range n {
			d := &decoder{b: c.reply()}
			xid := d.u32()
			if !waiting[xid] {
				t.Fatalf("reply to %d, which was not asked or was answered", xid)
			}
			delete(waiting, xid)
			d.take(20)
			if st := status(d.u32()); st != ok {
				t.Errorf("status %d", st)
			}
		}
	}
}

// TestReplay: a call that is repeated after a broken connection gets the answer
// of the first time; the same call in earnest does not.
func TestReplay(t *testing.T) {
	s, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	c.create(c.root, "f", createGuarded, set{})
	e := &buffer{}
	e.opaque(c.root)
	e.str("f")
	rec := c.request(progNFS, 3, 12, e.b)
	xid := c.xid
	for i, want := range []status{ok, ok, ok} {
		c := dial(t, addr, 0, 0)
		c.xid = xid
		c.nc.Write(rec)
		_, d := c.accepted(c.reply())
		if st := status(d.u32()); st != want {
			t.Errorf("REMOVE, time %d: %d, want %d", i, st, want)
		}
	}
	if st := c.remove(c.root, "f"); st != errNoEnt {
		t.Errorf("REMOVE with another xid: %d", st)
	}
	if n := s.Stats().Replayed; n != 2 {
		t.Errorf("%d replayed, want 2", n)
	}
}

func TestAdmission(t *testing.T) {
	var admit atomic.Bool
	var asked atomic.Value
	s, err := New(Config{Exports: []Export{testExport(t, t.TempDir())}, HandleKey: testKey, MaxConns: 1,
		Allow: func(a netip.Addr) bool { asked.Store(a); return admit.Load() }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ln, err := net.Listen("tcp", ":0") // dual stack: the peer shows as an IPv4-mapped address
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(ln.Addr().(*net.TCPAddr).Port)).String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, ln) }()

	dial(t, addr, 0, 0).closed()
	if want := netip.MustParseAddr("127.0.0.1"); asked.Load() != want {
		t.Errorf("asked about %v, want %v", asked.Load(), want)
	}
	admit.Store(true)
	c := connect(t, addr, "/", 0, 0)
	dial(t, addr, 0, 0).closed() // one too many
	if st := s.Stats(); st.Refused != 2 || st.Accepted != 1 {
		t.Errorf("%+v", st)
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	c.closed()
	if err := s.Serve(context.Background(), ln); err == nil {
		t.Error("Serve of a closed listener returned nil")
	}
}

func TestThreads(t *testing.T) {
	needRoot(t)
	p := newThreadPool(4)
	defer p.close()
	id := func(uid uint32) identity {
		return identity{uid: uid, gid: uid, groups: string(binary.NativeEndian.AppendUint32(nil, uid+1))}
	}
	status := func() (uid, gid, groups int) {
		u, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, ^uintptr(0), 0, 0)
		g, _, _ := unix.RawSyscall(unix.SYS_SETFSGID, ^uintptr(0), 0, 0)
		list, err := unix.Getgroups()
		if err != nil || len(list) != 1 {
			return int(u), int(g), -1
		}
		return int(u), int(g), list[0]
	}
	done := make(chan bool)
	for i := range 40 {
		go func() {
			defer func() { done <- true }()
			want := 1000 + i%5
			err := p.run(id(uint32(want)), func() {
				if u, g, s := status(); u != want || g != want || s != want+1 {
					t.Errorf("as %d: uid %d, gid %d, group %d", want, u, g, s)
				}
			})
			if err != nil {
				t.Error(err)
			}
		}()
	}
	for range 40 {
		<-done
	}
	if u, g, _ := status(); u != 0 || g != 0 {
		t.Errorf("the test itself runs as %d, %d", u, g)
	}
	// A panic comes out where it was caused, and the thread is still good.
	func() {
		defer func() {
			if recover() != "boom" {
				t.Error("no panic")
			}
		}()
		p.run(id(1), func() { panic("boom") })
	}()
	if err := p.run(id(2), func() {}); err != nil {
		t.Error(err)
	}
}

// FuzzRecord feeds arbitrary bytes to the record reader and the header parser.
func FuzzRecord(f *testing.F) {
	c := &client{t: f}
	f.Add(c.request(progNFS, 3, 1, []byte{0, 0, 0, 0}))
	f.Add([]byte{0, 0, 0, 1, 7, 0, 0, 0, 0, 0x80, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bufio.NewReader(bytes.NewReader(in))
		for {
			rec, err := readRecord(r)
			if err != nil {
				if rec != nil {
					t.Error("a record and an error")
				}
				return
			}
			if len(rec.b) > len(in) {
				t.Errorf("a record of %d bytes from %d", len(rec.b), len(in))
			}
			d := &decoder{b: rec.b}
			h, err := new(credMemory).parseCall(d)
			if err != nil && !errors.Is(err, errRecord) {
				t.Errorf("error of another kind: %v", err)
			}
			if len(h.id.groups) > 64 || len(h.id.groups)%4 != 0 {
				t.Errorf("%d bytes of groups", len(h.id.groups))
			}
			rec.free()
		}
	})
}

// A program of an ordinary user can't take a port below 1024, and so can't say
// to be root.
func TestPrivilegedPorts(t *testing.T) {
	needRoot(t)
	s, err := New(Config{Exports: []Export{testExport(t, t.TempDir())}, HandleKey: testKey, PrivilegedPorts: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, ln) }()
	defer func() { cancel(); <-served }()

	dial(t, ln.Addr().String(), 0, 0).closed()
	for port := 1023; ; port-- {
		nc, err := (&net.Dialer{LocalAddr: &net.TCPAddr{Port: port}}).Dial("tcp", ln.Addr().String())
		if errors.Is(err, unix.EADDRINUSE) && port > 600 {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		c := &client{t: t, nc: nc, r: bufio.NewReader(nc)}
		if _, st := c.mount("/"); st != ok {
			t.Errorf("from port %d: status %d", port, st)
		}
		break
	}
	if n := s.Stats().Refused; n != 1 {
		t.Errorf("%d refused", n)
	}
}
