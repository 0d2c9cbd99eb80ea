package trial

import (
	"context"
	"errors"
	"io"
	"iter"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"krgimage/images/progress"
	"krgimage/pxe/vnet"
)

// These tests run real QEMUs, under emulation where KVM doesn't work, up to
// the point where a machine asks for its address.

// patience is for a busy machine: SeaBIOS and iPXE need some 5 s under TCG.
const patience = 3 * time.Minute

func install(t *testing.T, uefi bool) Install {
	t.Helper()
	if testing.Short() {
		t.Skip("runs QEMU")
	}
	in, err := Find(uefi)
	if err != nil {
		t.Skip(err)
	}
	return in
}

func TestProbe(t *testing.T) {
	in := install(t, false)
	a, err := Probe(t.Context(), in.QEMU)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s after %s: %s", a.Name, a.Took, a.Reason)
	if a.Name != "kvm" && a.Name != "tcg" || a.Reason == "" || a.Took == 0 {
		t.Errorf("got %+v", a)
	}
}

func TestProbeBrokenAccelerator(t *testing.T) {
	in := install(t, false)
	_, err := runProbe(t.Context(), in.QEMU, []string{"-accel", "nonsense"}, tcgLimit)
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("error %v doesn't pass on what QEMU said", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := runProbe(ctx, in.QEMU, tcg.Args, tcgLimit); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// listener is a head node that only listens to DHCP: each DISCOVER is a boot.
type listener struct {
	network *vnet.Network
	boots   chan Boot
}

func (l *listener) Run(ctx context.Context, ready func()) error {
	conn, err := l.network.ListenUDP(67)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	ready()
	buf := make([]byte, 1500)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		p, err := dhcpv4.FromBytes(buf[:n])
		if err != nil || p.MessageType() != dhcpv4.MessageTypeDiscover {
			continue
		}
		now := time.Now()
		select {
		case l.boots <- Boot{MAC: p.ClientHWAddr.String(), Started: now, Events: []Event{{Stage: "dhcp", At: now, Detail: p.ClassIdentifier()}}}:
		case <-ctx.Done():
			return nil
		}
	}
}

func (l *listener) Watch(ctx context.Context) iter.Seq[Boot] {
	return func(yield func(Boot) bool) {
		for {
			select {
			case b := <-l.boots:
				if !yield(b) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}
}

func testOptions(t *testing.T, n int) Options {
	opt := Options{
		Dir: filepath.Join(t.TempDir(), "trial"), Session: 7, Memory: 128 << 20, CPUs: 1,
		Head: netip.MustParsePrefix("10.77.0.254/24"), Accel: &tcg,
	}
	for id := 1; id <= n; id++ {
		opt.Machines = append(opt.Machines, Machine{
			ID: id, Hostname: "krg-" + string(rune('0'+id)), MAC: MAC(7, id),
			Address: netip.AddrFrom4([4]byte{10, 77, 0, byte(id)}),
		})
	}
	return opt
}

// buffer is a strings.Builder for two goroutines.
type buffer struct {
	mu sync.Mutex
	s  strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.s.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.s.String()
}

func TestTrial(t *testing.T) {
	for _, tt := range []struct {
		name  string
		uefi  bool
		class string
	}{
		{"BIOS", false, "PXEClient:Arch:00000:"},
		{"UEFI", true, "PXEClient:Arch:00007:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			install(t, tt.uefi)
			testTrial(t, tt.uefi, tt.class)
		})
	}
}

// testTrial boots a machine up to its DISCOVER, asks about it from outside,
// resets it, takes its power, and stops the trial.
func testTrial(t *testing.T, uefi bool, class string) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	opt := testOptions(t, 1)
	var out buffer
	var capture buffer
	opt.UEFI, opt.Out, opt.Style, opt.Capture = uefi, &out, progress.Plain, &capture
	c, err := New(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	head := &listener{c.Network(), make(chan Boot)}
	runCtx, stop := context.WithCancel(ctx)
	defer stop()
	ran := make(chan error, 1)
	go func() { ran <- c.Run(runCtx, head) }()

	booted := func(r Report) (bool, error) { return r.Nodes[0].Stage == "dhcp", nil }
	wait := func(what string, done func(Report) (bool, error)) {
		t.Helper()
		if err := c.WaitFor(ctx, done); err != nil {
			select {
			case err = <-ran:
			default:
			}
			t.Fatalf("%s: %v\nconsole: %q\nshown:\n%s", what, err, c.Node(1).Console().Ring(), out.String())
		}
	}
	wait("first boot", booted)

	r, err := Status(ctx, opt.Dir)
	if err != nil {
		t.Fatal(err)
	}
	n := r.Nodes[0]
	if n.Stage != "dhcp" || n.PID == 0 || n.SSHPort() == 0 || n.SSHHost() != "127.0.0.1" {
		t.Errorf("status %+v", n)
	}
	if !strings.HasPrefix(n.Detail, class) {
		t.Errorf("vendor class %q, want %s…", n.Detail, class)
	}
	if _, err := New(ctx, opt); !errors.Is(err, ErrRunning) {
		t.Errorf("a second trial on the same state: %v, want ErrRunning", err)
	}
	first := n.PID

	if err := Control(ctx, opt.Dir, 1, "reset"); err != nil {
		t.Fatal(err)
	}
	wait("reset", func(r Report) (bool, error) { return r.Nodes[0].Stage == "firmware", nil })
	wait("boot after the reset", booted)
	if got := c.Report().Nodes[0].PID; got != first {
		t.Errorf("after a reset QEMU is process %d, it was %d", got, first)
	}

	if err := Control(ctx, opt.Dir, 1, "kill"); err != nil {
		t.Fatal(err)
	}
	wait("power cut", func(r Report) (bool, error) { return r.Nodes[0].Stage == "off", nil })
	if err := Control(ctx, opt.Dir, 1, "reset"); err == nil || !strings.Contains(err.Error(), "off") {
		t.Errorf("reset of a machine that is off: %v", err)
	}
	if err := Control(ctx, opt.Dir, 9, "reset"); err == nil {
		t.Error("a node that isn't there was reset")
	}
	if err := Control(ctx, opt.Dir, 1, "start"); err != nil {
		t.Fatal(err)
	}
	wait("boot after the power cut", booted)

	// Another process sees the console's past.
	near, far := net.Pipe()
	defer near.Close()
	attachCtx, detach := context.WithCancel(ctx)
	attached := make(chan error, 1)
	go func() { attached <- AttachConsole(attachCtx, opt.Dir, 1, far, far) }()
	if ring := c.Node(1).Console().Ring(); len(ring) == 0 {
		t.Error("the firmware said nothing on the serial line")
	} else if _, err := io.ReadFull(near, make([]byte, min(len(ring), 100))); err != nil {
		t.Errorf("attach: %v", err)
	}
	detach()
	near.Close()
	<-attached

	last := c.Report().Nodes[0].PID
	stop()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	if p, err := identify(last); err == nil {
		t.Errorf("QEMU %d lives on after the trial", p.PID)
	}
	if _, err := Status(ctx, opt.Dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("status of an ended trial: %v, want ErrNotRunning", err)
	}
	rec, err := loadRecord(opt.Dir)
	if err != nil || rec.Supervisor != nil || rec.Nodes[0].QEMU != nil || rec.Nodes[0].SSH != n.SSH {
		t.Errorf("record of an ended trial: %+v, %v", rec, err)
	}
	if log, _ := os.ReadFile(n.Log); len(log) == 0 {
		t.Error("the console's log is empty")
	}
	shown := out.String()
	if got := strings.Count(shown, " dhcp "); got != 3 {
		t.Errorf("%d boots were shown, want 3:\n%s", got, shown)
	}
	if len(capture.String()) < 400 {
		t.Error("no frames in the capture")
	}
	t.Logf("shown:\n%s", shown)
}

func TestNodeThatCannotStart(t *testing.T) {
	in := install(t, false)
	n := newNode(hardware{
		Machine: testOptions(t, 1).Machines[0], Install: in, accel: []string{"-accel", "nonsense"},
		memory: 64 << 20, cpus: 1, wire: filepath.Join(t.TempDir(), "nobody"),
	}, io.Discard, func() {})
	err := n.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("error %v doesn't pass on what QEMU said", err)
	}
	if err := n.Reset(t.Context()); !errors.Is(err, ErrOff) {
		t.Errorf("reset: %v, want ErrOff", err)
	}
}
