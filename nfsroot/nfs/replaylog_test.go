package nfs

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// serveLogged is a server with a replay log, until stop.
func serveLogged(t *testing.T, dir, log string) (s *Server, addr string, stop func()) {
	t.Helper()
	s, err := New(Config{Exports: []Export{testExport(t, dir)}, HandleKey: testKey, ReplayLog: log})
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
	return s, ln.Addr().String(), func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		s.Close()
	}
}

// once are calls that can't be done twice. prepare makes what they need.
var onceCalls = map[string]struct {
	proc    uint32
	prepare func(c *client)
	args    func(c *client, e *buffer)
}{
	"REMOVE": {12, func(c *client) { c.create(c.root, "f", createGuarded, set{}) }, func(c *client, e *buffer) { e.opaque(c.root); e.str("f") }},
	"RMDIR":  {13, func(c *client) { c.mkdir(c.root, "d", 0o755) }, func(c *client, e *buffer) { e.opaque(c.root); e.str("d") }},
	"RENAME": {14, func(c *client) { c.create(c.root, "f", createGuarded, set{}) }, func(c *client, e *buffer) {
		e.opaque(c.root)
		e.str("f")
		e.opaque(c.root)
		e.str("g")
	}},
	"MKDIR": {9, func(*client) {}, func(c *client, e *buffer) {
		e.opaque(c.root)
		e.str("d")
		for range 6 {
			e.u32(0) // attributes: none is set
		}
	}},
	"LINK": {15, func(c *client) { c.create(c.root, "f", createGuarded, set{}) }, func(c *client, e *buffer) {
		f, _ := c.lookup(c.root, "f")
		e.opaque(f)
		e.opaque(c.root)
		e.str("l")
	}},
	"CREATE": {8, func(*client) {}, func(c *client, e *buffer) {
		e.opaque(c.root)
		e.str("new")
		e.u32(createGuarded)
		for range 6 {
			e.u32(0)
		}
	}},
}

// TestReplayLog repeats calls at a server whose predecessor was killed: after it
// had answered, after it had done the call, or before it had.
func TestReplayLog(t *testing.T) {
	for name, tc := range onceCalls {
		for _, when := range []string{"answered", "done", "begun"} {
			t.Run(name+" "+when, func(t *testing.T) {
				dir, log := t.TempDir(), filepath.Join(t.TempDir(), "replays")
				s, addr, stop := serveLogged(t, dir, log)
				c := connect(t, addr, "/", 0, 0)
				tc.prepare(c)
				e := &buffer{}
				tc.args(c, e)
				call := c.request(progNFS, 3, tc.proc, e.b)
				xid := c.xid
				var first []byte
				if when == "begun" {
					s.replays.begin(netip.MustParseAddr("127.0.0.1"), &callHeader{xid: xid, proc: tc.proc}, e.b)
				} else {
					c.nc.Write(call)
					first = bytes.Clone(c.reply())
				}
				if when == "done" {
					for i := range s.replays.log.slot {
						if slot := &s.replays.log.slot[i]; slot.xid == xid {
							slot.state, slot.size = slotBegun, 0
						}
					}
				}
				stop()

				s, addr, stop = serveLogged(t, dir, log)
				defer stop()
				for range 2 { // the second is answered from memory in any case
					c := dial(t, addr, 0, 0)
					c.xid = xid
					c.nc.Write(call)
					again := c.reply()
					if when == "answered" && !bytes.Equal(again, first) {
						t.Errorf("another answer: %x, first %x", again, first)
					}
					if _, d := c.accepted(again); status(d.u32()) != ok {
						t.Errorf("the call fails now: %x", again)
					}
				}
				want := uint64(1)
				if when == "answered" {
					want = 2
				}
				if n := s.Stats().Replayed; n != want {
					t.Errorf("%d replayed, want %d", n, want)
				}
				// In earnest it is another call.
				c = connect(t, addr, "/", 0, 0)
				c.xid = xid + 100
				c.nc.Write(c.request(progNFS, 3, tc.proc, e.b))
				if _, d := c.accepted(c.reply()); status(d.u32()) == ok {
					t.Error("done a second time")
				}
			})
		}
	}
}

// What another boot of the machine left, or what is no replay log, is begun anew.
func TestReplayLogOfAnotherTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "replays")
	fill := func() {
		t.Helper()
		l, err := openReplayLog(path, 8)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(l.load()); n != 0 {
			t.Errorf("%d calls in a new log", n)
		}
		c := newReplayCache(8, l)
		for i := range uint32(20) { // the ring goes round
			e, _, _ := c.begin(netip.MustParseAddr("10.0.0.1"), &callHeader{xid: i}, nil)
			if i%2 == 0 {
				c.end(e, []byte{byte(i)})
			}
		}
		l.close()
	}
	fill()
	l, err := openReplayLog(path, 8)
	if err != nil {
		t.Fatal(err)
	}
	calls := l.load()
	if len(calls) != 8 {
		t.Fatalf("%d calls", len(calls))
	}
	for i, e := range calls {
		if want := uint32(12 + i); e.key.xid != want || e.cut != (want%2 == 1) {
			t.Errorf("call %d: %+v", i, e)
		}
	}
	l.close()

	raw, _ := os.ReadFile(path)
	copy(raw[16:], "another boot")
	for name, content := range map[string][]byte{"another boot": raw, "cut": raw[:100], "garbage": bytes.Repeat([]byte{0xff}, len(raw)), "empty": nil} {
		t.Log(name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		fill()
	}
}
