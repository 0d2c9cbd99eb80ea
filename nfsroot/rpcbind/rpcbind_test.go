package rpcbind

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"krgimage/nfsroot/sunrpc"
)

// ask makes a call and returns the reply.
func ask(t *testing.T, r *Registry, vers, proc uint32, root bool, args func(*sunrpc.Encoder)) *sunrpc.Decoder {
	t.Helper()
	e, reply := &sunrpc.Encoder{}, &sunrpc.Encoder{}
	args(e)
	c := &sunrpc.Call{Prog: sunrpc.ProgramRPCBind, Vers: vers, Proc: proc, Privileged: root, Local: netip.MustParseAddr("10.0.0.1"),
		Peer: netip.MustParseAddrPort("127.0.0.1:600"), Args: sunrpc.NewDecoder(e.Bytes()), Reply: reply}
	if accept := r.Program(nil, true).Handle(c); accept != sunrpc.Success {
		t.Fatalf("version %d procedure %d: %s", vers, proc, accept)
	}
	return sunrpc.NewDecoder(reply.Bytes())
}

func mapping(v ...uint32) func(*sunrpc.Encoder) {
	return func(e *sunrpc.Encoder) {
		for _, v := range v {
			e.Uint32(v)
		}
	}
}

func rpcb(prog, vers uint32, net, addr string) func(*sunrpc.Encoder) {
	return func(e *sunrpc.Encoder) {
		e.Uint32(prog)
		e.Uint32(vers)
		e.String(net)
		e.String(addr)
		e.String("owner")
	}
}

// TestVersions enters with one version of the protocol and looks up with another.
func TestVersions(t *testing.T) {
	r := &Registry{}
	if ask(t, r, 2, procSet, false, mapping(100021, 4, protoTCP, 4045)).Bool() {
		t.Fatal("a user may enter programs")
	}
	if !ask(t, r, 4, procSet, true, rpcb(100021, 4, "tcp", "0.0.0.0.15.205")).Bool() || !ask(t, r, 2, procSet, true, mapping(100021, 4, protoUDP, 4046)).Bool() {
		t.Fatal("root may not enter programs")
	}
	if ask(t, r, 2, procSet, true, mapping(100021, 4, protoTCP, 9)).Bool() {
		t.Error("a place was taken twice")
	}
	if got := ask(t, r, 2, procGet, false, mapping(100021, 4, protoTCP, 0)).Uint32(); got != 4045 {
		t.Errorf("GETPORT: %d", got)
	}
	if got := ask(t, r, 2, procGet, false, mapping(100021, 1, protoUDP, 0)).Uint32(); got != 4046 {
		t.Errorf("GETPORT of another version: %d", got)
	}
	if got := ask(t, r, 2, procGet, false, mapping(100005, 3, protoTCP, 0)).Uint32(); got != 0 {
		t.Errorf("GETPORT of what is not there: %d", got)
	}
	if got := ask(t, r, 3, procGet, false, rpcb(100021, 4, "udp", "")).String(100); got != "10.0.0.1.15.206" {
		t.Errorf("GETADDR: %q", got)
	}
	if got := ask(t, r, 4, procGet, false, rpcb(100005, 4, "udp", "")).String(100); got != "" {
		t.Errorf("GETADDR of what is not there: %q", got)
	}
	d := ask(t, r, 2, procDump, false, mapping())
	n := 0
	for d.Bool() {
		mapping(d.Uint32(), d.Uint32(), d.Uint32(), d.Uint32())
		n++
	}
	if n != 2 || d.Bad() {
		t.Errorf("DUMP has %d entries", n)
	}
	if ask(t, r, 4, procUnset, false, rpcb(100021, 4, "", "")).Bool() || !ask(t, r, 4, procUnset, true, rpcb(100021, 4, "", "")).Bool() || len(r.Entries()) != 0 {
		t.Error("UNSET")
	}
}

func TestGetPort(t *testing.T) {
	r := &Registry{}
	r.Set(Entry{Prog: 100021, Vers: 4, Net: "tcp", Port: 4045})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &sunrpc.Server{Programs: []sunrpc.Program{r.Program(nil, false)}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	defer func() { cancel(); <-done }()
	dial := func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
		return sunrpc.Dial(ctx, ln.Addr().(*net.TCPAddr).AddrPort())
	}
	if port, err := GetPort(ctx, dial, loopback, 100021, 4); port != 4045 || err != nil {
		t.Errorf("port %d, %v", port, err)
	}
	if _, err := GetPort(ctx, dial, loopback, 100024, 1); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("a program that is not there: %v", err)
	}
}

func FuzzProgram(f *testing.F) {
	for _, vers := range []uint32{2, 3, 4} {
		for proc := range uint32(13) {
			f.Add(vers, proc, make([]byte, 40))
		}
	}
	f.Fuzz(func(t *testing.T, vers, proc uint32, args []byte) {
		r := &Registry{}
		c := &sunrpc.Call{Vers: vers, Proc: proc, Privileged: true, Args: sunrpc.NewDecoder(args), Reply: &sunrpc.Encoder{}}
		if accept := r.Program(nil, true).Handle(c); accept == sunrpc.SystemErr {
			t.Errorf("version %d procedure %d: %s", vers, proc, accept)
		}
	})
}
