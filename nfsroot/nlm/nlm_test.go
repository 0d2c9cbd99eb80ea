package nlm

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/nsm"
	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// fakeFiles has a file for every handle; some are special.
type fakeFiles struct{}

func (fakeFiles) LockKey(h []byte) (string, bool) { return string(h), string(h) != "forged" }

func (fakeFiles) MayLock(h []byte, c sunrpc.Cred, exclusive bool) error {
	switch {
	case string(h) == "gone":
		return unix.ESTALE
	case string(h) == "read-only" && exclusive:
		return unix.EROFS
	case string(h) == "private" && c.UID != 0:
		return unix.EACCES
	}
	return nil
}

// lockd is a client's lock manager with its rpcbind, reached by a fake network:
// both are at one address, told apart by their ports.
type lockd struct {
	granted chan uint64 // offsets
	notices chan nsm.Notice
	answer  status
}

func (l *lockd) dial(t *testing.T) sunrpc.Dialer {
	registry := &rpcbind.Registry{}
	registry.Set(rpcbind.Entry{Prog: sunrpc.ProgramNLM, Vers: Version, Net: "tcp", Port: 4045})
	registry.Set(rpcbind.Entry{Prog: sunrpc.ProgramNSM, Vers: nsm.Version, Net: "tcp", Port: 4046})
	server := &sunrpc.Server{Programs: []sunrpc.Program{
		registry.Program(nil, false),
		{Number: sunrpc.ProgramNLM, Low: Version, High: Version, Handle: func(c *sunrpc.Call) sunrpc.Accept {
			if c.Proc != procGranted {
				return sunrpc.ProcUnavail
			}
			cookie := c.Args.Opaque(maxCookie)
			r := request{exclusive: c.Args.Bool()}
			r.readLock(c.Args)
			c.Reply.Opaque(cookie)
			c.Reply.Uint32(uint32(l.answer))
			l.granted <- r.offset
			return sunrpc.Success
		}},
		{Number: sunrpc.ProgramNSM, Low: nsm.Version, High: nsm.Version, Handle: func(c *sunrpc.Call) sunrpc.Accept {
			l.notices <- nsm.DecodeNotice(c.Args)
			return sunrpc.Success
		}},
	}}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	t.Cleanup(func() { cancel(); <-done })
	to := ln.Addr().(*net.TCPAddr).AddrPort()
	return func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { return sunrpc.Dial(ctx, to) }
}

func newLockd() *lockd {
	return &lockd{granted: make(chan uint64, 16), notices: make(chan nsm.Notice, 16)}
}

func open(t *testing.T, journal, bootID string, l *lockd) *Server {
	t.Helper()
	s, err := New(Config{
		Files: fakeFiles{}, Journal: journal, BootID: bootID, Name: "server", Dial: l.dial(t),
		Grace: 100 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// serve runs what a server does beside answering; calls are made directly.
func serve(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln, nil, nil) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			s.Close()
		}
	}
	t.Cleanup(stop)
	return stop
}

// ask makes a call from a client's kernel and returns the status.
func ask(t *testing.T, s *Server, proc uint32, r request) status {
	t.Helper()
	return askFrom(t, s, proc, r, netip.AddrPortFrom(r.client, 700))
}

func askFrom(t *testing.T, s *Server, proc uint32, r request, from netip.AddrPort) status {
	t.Helper()
	e := &sunrpc.Encoder{}
	e.String("c")
	switch proc {
	case procTest:
		e.Bool(r.exclusive)
	case procLock, procCancel, procNMLock:
		e.Bool(r.block)
		e.Bool(r.exclusive)
	}
	e.String("caller")
	e.Opaque(r.handle)
	e.String("oh")
	e.Uint32(uint32(r.svid))
	e.Uint64(r.offset)
	e.Uint64(r.length)
	if proc == procLock || proc == procNMLock {
		e.Bool(r.reclaim)
		e.Uint32(uint32(r.state))
	}
	reply := &sunrpc.Encoder{}
	c := &sunrpc.Call{Proc: proc, Vers: Version, Peer: from, Privileged: from.Port() < 1024, Cred: r.cred, Args: sunrpc.NewDecoder(e.Bytes()), Reply: reply}
	if accept := s.handle(c); accept != sunrpc.Success {
		t.Fatalf("procedure %d: %s", proc, accept)
	}
	d := sunrpc.NewDecoder(reply.Bytes())
	if d.String(9) != "c" {
		t.Fatal("another cookie")
	}
	return status(d.Uint32())
}

func req(client netip.Addr, svid int32, handle string) request {
	return request{client: client, svid: svid, handle: []byte(handle), exclusive: true}
}

func TestAnswers(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "locks"), "boot", newLockd())
	defer s.Close()
	a, b := req(clientA, 1, "f"), req(clientB, 1, "f")
	blocking := b
	blocking.block = true
	far := a
	far.offset = 1 << 63
	poor := req(clientA, 1, "private")
	poor.cred.UID = 1000
	for i, step := range []struct {
		proc uint32
		r    request
		want status
	}{
		{procLock, a, granted}, {procLock, a, granted}, {procTest, a, granted}, {procTest, b, denied}, {procLock, b, denied},
		{procNMLock, blocking, denied}, {procLock, blocking, blocked}, {procLock, blocking, blocked}, {procCancel, b, granted}, {procCancel, b, denied},
		{procUnlock, b, granted}, {procLock, b, denied}, {procUnlock, a, granted}, {procLock, b, granted},
		{procLock, req(clientA, 1, "forged"), stale}, {procLock, req(clientA, 1, "gone"), stale}, {procUnlock, req(clientA, 1, "gone"), granted},
		{procLock, req(clientA, 1, "read-only"), readOnly}, {procLock, poor, failed}, {procLock, far, tooFar},
	} {
		if got := ask(t, s, step.proc, step.r); got != step.want {
			t.Fatalf("step %d: procedure %d answers %d, want %d", i, step.proc, got, step.want)
		}
	}
	if got := askFrom(t, s, procUnlock, b, netip.AddrPortFrom(clientB, 40000)); got != noLocks {
		t.Errorf("a user's process is answered %d", got)
	}
	if got := ask(t, s, procLock, a); got != denied {
		t.Error("a user's process has unlocked what belongs to the kernel")
	}
	if n := s.ReleaseClient(clientB); n != 1 {
		t.Errorf("%d locks freed, want 1", n)
	}
	if got := ask(t, s, procLock, a); got != granted {
		t.Errorf("after the other client's end: %d", got)
	}
}

func TestGrants(t *testing.T) {
	for name, tc := range map[string]struct {
		answer status
		after  status // for another client
	}{"understood": {granted, denied}, "not wanted any more": {denied, granted}} {
		t.Run(name, func(t *testing.T) {
			l := newLockd()
			l.answer = tc.answer
			s := open(t, filepath.Join(t.TempDir(), "locks"), "boot", l)
			serve(t, s)
			a, b := req(clientA, 1, "f"), req(clientB, 1, "f")
			b.block, b.offset = true, 17
			ask(t, s, procLock, a)
			if got := ask(t, s, procLock, b); got != blocked {
				t.Fatalf("answer %d", got)
			}
			ask(t, s, procUnlock, a)
			if offset := <-l.granted; offset != 17 {
				t.Errorf("the call-back names offset %d", offset)
			}
			for s.Stats().Waiting > 0 { // until the answer is worked in
				time.Sleep(time.Millisecond)
			}
			if got := ask(t, s, procLock, a); got != tc.after {
				t.Errorf("the first client is answered %d, want %d", got, tc.after)
			}
		})
	}
}

// TestProcessRestart kills a server, as far as its files go, in the middle of
// everything: nothing is lost, and who waited is called.
func TestProcessRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "locks")
	s := open(t, path, "boot", newLockd())
	a, b := req(clientA, 1, "f"), req(clientB, 1, "f")
	b.block = true
	ask(t, s, procLock, a)
	ask(t, s, procLock, b)

	l := newLockd()
	s = open(t, path, "boot", l) // the first one is not closed
	serve(t, s)
	if st := s.Stats(); st.Locks != 1 || st.Waiting != 1 || st.Grace {
		t.Fatalf("after the restart: %+v", st)
	}
	other := req(clientB, 2, "f")
	if got := ask(t, s, procLock, other); got != denied {
		t.Errorf("a third one is answered %d", got)
	}
	ask(t, s, procUnlock, a)
	<-l.granted
}

func TestMachineRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "locks")
	s := open(t, path, "boot", newLockd())
	a, b := req(clientA, 1, "f"), req(clientB, 1, "g")
	ask(t, s, procLock, a)
	ask(t, s, procLock, b)
	s.Close()

	l := newLockd()
	s = open(t, path, "another boot", l)
	if !s.Stats().Grace {
		t.Fatal("no grace period")
	}
	fresh := req(clientB, 5, "f")
	if got := ask(t, s, procLock, fresh); got != inGrace {
		t.Errorf("a new lock in the grace period is answered %d", got)
	}
	reclaim := a
	reclaim.reclaim = true
	if got := ask(t, s, procLock, reclaim); got != granted {
		t.Errorf("a reclaim is answered %d", got)
	}
	serve(t, s)
	for range 2 {
		if n := <-l.notices; n.Name != "server" || n.State%2 != 1 {
			t.Errorf("notice %+v", n)
		}
	}
	for s.Stats().Grace {
		time.Sleep(time.Millisecond)
	}
	if got := ask(t, s, procLock, fresh); got != denied {
		t.Errorf("a lock against a reclaimed one is answered %d", got)
	}
	if got := ask(t, s, procLock, req(clientA, 5, "g")); got != granted {
		t.Errorf("what was not reclaimed is not free: %d", got)
	}
}

// TestNotice is a client that booted: it loses what it held before, and not
// what it took since.
func TestNotice(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "locks"), "boot", newLockd())
	defer s.Close()
	old, young := req(clientA, 1, "f"), req(clientA, 2, "g")
	old.state, young.state = 3, 5
	ask(t, s, procLock, old)
	ask(t, s, procLock, young)
	notify := func(from netip.AddrPort) {
		e := &sunrpc.Encoder{}
		nsm.Notice{Name: "a", State: 5}.Encode(e)
		s.nsmProgram().Handle(&sunrpc.Call{Proc: nsm.ProcNotify, Peer: from, Privileged: from.Port() < 1024, Args: sunrpc.NewDecoder(e.Bytes()), Reply: &sunrpc.Encoder{}})
	}
	notify(netip.AddrPortFrom(clientA, 5000))
	notify(netip.AddrPortFrom(clientB, 700))
	if n := s.Stats().Locks; n != 2 {
		t.Fatalf("%d locks after notices of others", n)
	}
	notify(netip.AddrPortFrom(clientA, 700))
	if got := ask(t, s, procLock, req(clientB, 1, "f")); got != granted {
		t.Errorf("the old lock is still there: %d", got)
	}
	if got := ask(t, s, procLock, req(clientB, 1, "g")); got != denied {
		t.Errorf("the new lock is gone: %d", got)
	}
}

// FuzzCalls feeds every procedure of both programs with arbitrary arguments.
func FuzzCalls(f *testing.F) {
	for proc := range uint32(24) {
		f.Add(proc, []byte("\x00\x00\x00\x01c\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01n\x00\x00\x00\x00\x00\x00\x01f\x00\x00\x00\x00\x00\x00\x01o\x00\x00\x00"+
			"\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	}
	path := filepath.Join(f.TempDir(), "locks")
	s, err := New(Config{Files: fakeFiles{}, Journal: path, BootID: "boot", Dial: sunrpc.Dial})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, proc uint32, args []byte) {
		for _, p := range []sunrpc.Program{s.nlmProgram(), s.nsmProgram()} {
			c := &sunrpc.Call{Proc: proc % 25, Vers: p.Low, Peer: netip.AddrPortFrom(clientA, 700), Privileged: true, Args: sunrpc.NewDecoder(args), Reply: &sunrpc.Encoder{}}
			if accept := p.Handle(c); accept == sunrpc.SystemErr {
				t.Errorf("procedure %d: %s", c.Proc, accept)
			}
		}
	})
}
