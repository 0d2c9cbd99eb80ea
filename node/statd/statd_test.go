package statd

import (
	"net/netip"
	"testing"

	"krgimage/nfsroot/nsm"
	"krgimage/nfsroot/sunrpc"
)

var (
	server = netip.MustParseAddr("10.0.0.254")
	kernel = netip.MustParseAddrPort("127.0.0.1:700")
)

// call does a call of NSM and returns the reply.
func call(t *testing.T, m *Monitor, proc uint32, from netip.AddrPort, args func(*sunrpc.Encoder)) *sunrpc.Decoder {
	t.Helper()
	e, reply := &sunrpc.Encoder{}, &sunrpc.Encoder{}
	if args != nil {
		args(e)
	}
	c := &sunrpc.Call{Proc: proc, Vers: 1, Peer: from, Privileged: from.Port() < 1024, Args: sunrpc.NewDecoder(e.Bytes()), Reply: reply}
	if accept := m.program().Handle(c); accept != sunrpc.Success {
		t.Fatalf("procedure %d: %s", proc, accept)
	}
	return sunrpc.NewDecoder(reply.Bytes())
}

func mon(e *sunrpc.Encoder) {
	e.String("10.0.0.254")
	e.String("krg-1")
	e.Uint32(sunrpc.ProgramNLM)
	e.Uint32(3)
	e.Uint32(16)
	e.Fixed([]byte("0123456789abcdef"))
}

func TestOnlyTheKernelWatches(t *testing.T) {
	for from, want := range map[string]bool{"127.0.0.1:700": true, "127.0.0.1:7000": false, "10.0.0.254:700": false} {
		m := New(Config{Server: server, State: 7})
		d := call(t, m, nsm.ProcMon, netip.MustParseAddrPort(from), mon)
		if refused, state := d.Bool(), d.Uint32(); refused == want || state != 7 || (len(m.watched) == 1) != want {
			t.Errorf("MON from %s: refused %t, state %d, %d watched", from, refused, state, len(m.watched))
		}
	}
}

func TestUnmon(t *testing.T) {
	m := New(Config{Server: server, State: 7})
	call(t, m, nsm.ProcMon, kernel, mon)
	call(t, m, nsm.ProcUnmon, netip.MustParseAddrPort("127.0.0.1:7000"), mon)
	if len(m.watched) != 1 {
		t.Error("a user may end the watch")
	}
	call(t, m, nsm.ProcUnmon, kernel, mon)
	if len(m.watched) != 0 {
		t.Error("UNMON does nothing")
	}
}

func TestOnlyTheServerNotifies(t *testing.T) {
	for from, want := range map[string]int{"10.0.0.254:700": 1, "10.0.0.254:7000": 1, "10.0.0.7:700": 0, "127.0.0.1:7000": 0} {
		m := New(Config{Server: server, State: 7})
		call(t, m, nsm.ProcNotify, netip.MustParseAddrPort(from), nsm.Notice{Name: "any", State: 9}.Encode)
		if len(m.notify) != want {
			t.Errorf("NOTIFY from %s: %d pass, want %d", from, len(m.notify), want)
		}
	}
}

func FuzzProgram(f *testing.F) {
	for proc := range uint32(8) {
		f.Add(proc, make([]byte, 48))
	}
	f.Fuzz(func(t *testing.T, proc uint32, args []byte) {
		if proc == nsm.ProcSimuCrash {
			return // calls the server
		}
		m := New(Config{Server: server, State: 7})
		m.program().Handle(&sunrpc.Call{Proc: proc, Vers: 1, Peer: kernel, Privileged: true, Args: sunrpc.NewDecoder(args), Reply: &sunrpc.Encoder{}})
	})
}
