package trial

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/images/progress"
)

func TestPlan(t *testing.T) {
	c := configs.Default()
	c.Network.Head = netip.MustParseAddr("10.77.0.254")
	c.Nodes.Table = []configs.Node{{MAC: "aa:bb:cc:dd:ee:ff", ID: 2, Hostname: "big", Address: netip.MustParseAddr("10.77.0.42")}}
	got, err := Plan(c, 2)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, n := range Table(got) {
		lines = append(lines, fmt.Sprint(n.ID, n.Hostname, n.MAC, n.Address))
	}
	want := []string{"1 krg-1 52:54:00:00:01:01 10.77.0.1", "2 big 52:54:00:00:01:02 10.77.0.42"}
	for i := range want {
		want[i] = strings.ReplaceAll(want[i], " ", "")
		lines[i] = strings.ReplaceAll(lines[i], " ", "")
	}
	if d := cmp.Diff(want, lines); d != "" {
		t.Error(d)
	}
	for _, n := range []int{0, -1, 255, 254} {
		if _, err := Plan(c, n); err == nil {
			t.Errorf("%d nodes were accepted", n)
		}
	}
	if got := MAC(9999, 255).String(); got != "52:54:00:27:0f:ff" {
		t.Errorf("MAC %s", got)
	}
}

func TestChooseAccelerator(t *testing.T) {
	slow, fast := tcg, kvm
	slow.Took = 200 * time.Millisecond
	tests := []struct {
		name   string
		took   time.Duration
		err    error
		want   string
		reason string
	}{
		{"works", 100 * time.Millisecond, nil, "kvm", "a probe guest ran"},
		{"a little slower: start-up noise", 700 * time.Millisecond, nil, "kvm", "ran"},
		{"crawls", 4 * time.Second, nil, "tcg", "slower than emulation: 4.0 s against 0.2 s"},
		{"hangs", 0, context.DeadlineExceeded, "tcg", "did not finish"},
		{"fails", 0, errors.New("failed to set MSR"), "tcg", "doesn't work: failed to set MSR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := fast
			f.Took = tt.took
			got := choose(slow, f, tt.err)
			if got.Name != tt.want || !strings.Contains(got.Reason, tt.reason) {
				t.Errorf("%s: %s; want %s: …%s…", got.Name, got.Reason, tt.want, tt.reason)
			}
		})
	}
}

func TestFind(t *testing.T) {
	here := func(string) (string, error) { return "/usr/bin/qemu-system-x86_64", nil }
	gone := func(string) (string, error) { return "", exec.ErrNotFound }
	tests := []struct {
		name  string
		files []string
		look  func(string) (string, error)
		uefi  bool
		code  string
		hint  string
	}{
		{"no QEMU", nil, gone, false, "", "apt install qemu-system-x86)"},
		{"no ROM", nil, here, false, "", "apt install ipxe-qemu)"},
		{"BIOS", []string{"usr/lib/ipxe/qemu/pxe-virtio.rom"}, here, false, "", ""},
		{"no OVMF", nil, here, true, "", "apt install ovmf)"},
		{"Debian 13", []string{"usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"}, here, true, "OVMF_CODE_4M.fd", ""},
		{"old OVMF", []string{"usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"}, here, true, "OVMF_CODE.fd", ""},
		{"a code without variables", []string{"usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"}, here, true, "OVMF_CODE.fd", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for _, f := range tt.files {
				f = filepath.Join(root, f)
				if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(f, nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			in, err := find(root, tt.look, tt.uefi)
			switch {
			case tt.hint != "":
				if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), tt.hint) {
					t.Errorf("error %v, want …%s", err, tt.hint)
				}
			case err != nil:
				t.Error(err)
			case tt.code != "" && filepath.Base(in.Code) != tt.code:
				t.Errorf("code %s, want %s", in.Code, tt.code)
			}
		})
	}
}

func TestArgs(t *testing.T) {
	h := hardware{
		Machine: Machine{ID: 1, Hostname: "krg-1", MAC: MAC(1, 1)},
		Install: Install{Code: "/ovmf/code"}, accel: []string{"-accel", "tcg"},
		memory: 512 << 20, cpus: 2, wire: "/run/a,b/node1.sock",
	}
	bios := strings.Join(h.args(), " ")
	h.vars = "/state/node1.vars"
	uefi := strings.Join(h.args(), " ")
	for _, tt := range []struct {
		in, want string
	}{
		{bios, "-machine pc,graphics=off"},
		{bios, "-m 512 -smp 2"},
		{bios, "-netdev stream,id=n0,server=off,addr.type=unix,addr.path=/run/a,,b/node1.sock"},
		{bios, "-device virtio-net-pci,netdev=n0,bootindex=1,mac=52:54:00:00:01:01 "},
		{uefi, "mac=52:54:00:00:01:01,romfile= "},
		{uefi, "if=pflash,unit=0,format=raw,readonly=on,file=/ovmf/code"},
		{uefi, "if=pflash,unit=1,format=raw,file=/state/node1.vars"},
	} {
		if !strings.Contains(tt.in, tt.want) {
			t.Errorf("%q is not in\n%s", tt.want, tt.in)
		}
	}
	if strings.Contains(bios+uefi, "-no-reboot") {
		t.Error("a node's reboot would end it")
	}
}

func TestMerge(t *testing.T) {
	on := time.Unix(1000, 0)
	at := func(s float64) time.Time { return on.Add(time.Duration(s * float64(time.Second))) }
	running := power{pid: 5, since: on}
	tests := []struct {
		name    string
		w       power
		events  []Event
		stage   string
		seconds float64
		stages  int
	}{
		{"not started", power{}, nil, "waiting", 0, 0},
		{"nothing heard", running, nil, "firmware", 0, 1},
		{"under way", running, []Event{{"dhcp", at(5), ""}, {"kernel", at(8), ""}}, "kernel", 8, 3},
		{"told late", running, []Event{{"lease", at(9), ""}, {"link", at(8.5), ""}}, "lease", 9, 3},
		{"only the boot before the reset", running, []Event{{"ready", at(-20), ""}, {"reboot", at(-1), ""}}, "firmware", 0, 1},
		{"off", power{since: on}, []Event{{"ready", at(20), ""}}, "off", 20, 2},
		{"crashed", power{since: on, crash: "killed"}, nil, "crashed", 0, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := merge(NodeReport{}, tt.w, Boot{Events: tt.events})
			if n.Stage != tt.stage || n.Seconds != tt.seconds || len(n.Stages) != tt.stages {
				t.Errorf("got %s after %g s, %d stages; want %s, %g, %d", n.Stage, n.Seconds, len(n.Stages), tt.stage, tt.seconds, tt.stages)
			}
		})
	}
}

// boots shows two machines on their way in the given style.
func boots(style progress.Style) string {
	var out bytes.Buffer
	on := time.Unix(1000, 0)
	clock := on
	b := newBoard(&out, style, func() time.Time { return clock })
	node := func(id int, since time.Time, pid int, events ...Event) NodeReport {
		return merge(NodeReport{ID: id, Hostname: fmt.Sprintf("krg-%d", id), Address: netip.AddrFrom4([4]byte{10, 77, 0, byte(id)})},
			power{pid: pid, since: since}, Boot{Events: events})
	}
	at := func(d time.Duration) time.Time { return on.Add(d) }
	b.show([]NodeReport{node(1, on, 10), node(2, time.Time{}, 0)})
	dhcp := Event{"dhcp", at(5 * time.Second), ""}
	clock = at(6 * time.Second)
	b.show([]NodeReport{node(1, on, 10, dhcp), node(2, on, 11)})
	b.show([]NodeReport{node(1, on, 10, dhcp), node(2, at(time.Second), 11)}) // SeaBIOS's own reset
	clock = at(20 * time.Second)
	ready := Event{"ready", at(17 * time.Second), ""}
	failed := Event{"failed", at(12 * time.Second), "the NFS server at 10.77.0.254:2049 refuses the mount of /: permission denied"}
	b.show([]NodeReport{node(1, on, 10, dhcp, Event{"kernel", at(7 * time.Second), "12 MB"}, ready), node(2, at(time.Second), 11, failed)})
	clock = at(21 * time.Second)
	b.show([]NodeReport{node(1, on, 10, dhcp, Event{"kernel", at(7 * time.Second), "12 MB"}, ready), node(2, at(time.Second), 11, failed)})
	b.show([]NodeReport{node(1, at(20*time.Second), 10, dhcp, ready), node(2, at(time.Second), 11, failed)}) // rebooted
	b.show([]NodeReport{node(1, at(20*time.Second), 0), node(2, at(time.Second), 11, failed)})
	return out.String()
}

func TestBoard(t *testing.T) {
	for _, tt := range []struct {
		name  string
		style progress.Style
	}{{"plain", progress.Plain}, {"terminal", progress.Terminal}, {"json", progress.JSON}, {"quiet", progress.Quiet}} {
		t.Run(tt.name, func(t *testing.T) {
			got := strings.ReplaceAll(boots(tt.style), "\x1b", "ESC")
			golden := filepath.Join("testdata", "board."+tt.name)
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestStartTime(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20\n"
	tests := []struct {
		stat string
		want uint64
		err  bool
	}{
		{"12 (qemu)" + tail, 4711, false},
		{"12 (a) b (c))" + tail, 4711, false},
		{"12 (qemu)" + strings.Replace(tail, "S", "Z", 1), 0, true},
		{"12 (qemu) S 1 2", 0, true},
		{"12", 0, true},
		{"", 0, true},
	}
	for _, tt := range tests {
		got, err := parseStartTime([]byte(tt.stat))
		if got != tt.want || (err != nil) != tt.err {
			t.Errorf("%q: %d, %v", tt.stat, got, err)
		}
	}
}

// TestStop ends a supervisor that obeys, one that doesn't, and leaves alone
// whoever has got a recorded pid by now.
func TestStop(t *testing.T) {
	spawn := func(script string) *child {
		cmd := exec.Command("/bin/sh", "-c", script)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		c, err := startChild(cmd)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.kill)
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		return c
	}
	who := func(c *child) *Process {
		p, err := identify(c.pid())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	dir := t.TempDir()
	if err := Stop(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a record: %v, want ErrNotRunning", err)
	}

	obedient, qemu := spawn("echo; exec sleep 1000"), spawn("echo; exec sleep 1000")
	r := record{Supervisor: who(obedient), Nodes: []recordNode{{ID: 1, QEMU: who(qemu)}}}
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := Stop(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	<-obedient.done
	<-qemu.done
	if err := Stop(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("second Stop: %v, want ErrNotRunning", err)
	}

	stubborn := spawn("trap '' TERM; echo; while :; do sleep 1000; done")
	r = record{Supervisor: who(stubborn)}
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := Stop(ctx, dir); err != nil {
		t.Fatal(err)
	}
	<-stubborn.done

	stranger := spawn("echo; exec sleep 1000")
	p := who(stranger)
	p.Start--
	r = record{Supervisor: p, Nodes: []recordNode{{ID: 1, QEMU: p}}}
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := Stop(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("with another's pid: %v, want ErrNotRunning", err)
	}
	if stranger.ended() {
		t.Error("a process was killed that only has the pid of the trial")
	}

	if err := os.WriteFile(filepath.Join(dir, recordFile), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Stop(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("damaged record: %v", err)
	}
}

func TestProcessEnd(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	c, err := startChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	p, err := identify(c.pid())
	if err != nil {
		t.Fatal(err)
	}
	if !p.alive() {
		t.Error("a process that runs is taken for dead")
	}
	if err := p.end(t.Context(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-c.done
	if p.alive() {
		t.Error("a process that ended is taken for alive")
	}
	if (*Process)(nil).alive() {
		t.Error("no process is taken for alive")
	}
}

// TestChildDiesWithParent kills a process that has a child: this test again.
func TestChildDiesWithParent(t *testing.T) {
	if os.Getenv("TRIAL_TEST_PARENT") != "" {
		c, err := startChild(exec.Command("sleep", "1000"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := identify(c.pid())
		if err != nil {
			t.Fatal(err)
		}
		json.NewEncoder(os.Stdout).Encode(p)
		<-c.done
		return
	}
	parent := exec.Command(os.Args[0], "-test.run=^TestChildDiesWithParent$")
	parent.Env = append(os.Environ(), "TRIAL_TEST_PARENT=1")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var p Process
	if err := json.NewDecoder(out).Decode(&p); err != nil {
		t.Fatal(err)
	}
	fd, err := p.open()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	parent.Process.Kill()
	parent.Wait()
	ms := int(patience.Milliseconds())
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, ms); n != 1 {
		t.Errorf("the child outlives its parent: %v", err)
	}
}

func TestSSHPorts(t *testing.T) {
	machines := []Machine{{ID: 1}, {ID: 2}}
	first, err := listenSSH(machines, nil)
	if err != nil {
		t.Fatal(err)
	}
	addr := map[int]string{1: first[1].Addr().String(), 2: first[2].Addr().String()}
	if addr[1] == addr[2] {
		t.Fatal("two nodes on one port")
	}
	// While they are taken another trial gets others; once free, the same.
	second, err := listenSSH(machines, addr)
	if err != nil {
		t.Fatal(err)
	}
	for id, l := range second {
		if a := l.Addr().String(); a == addr[1] || a == addr[2] {
			t.Errorf("node %d got %s, which is taken", id, a)
		}
		l.Close()
		first[id].Close()
	}
	third, err := listenSSH(machines, addr)
	if err != nil {
		t.Fatal(err)
	}
	for id, l := range third {
		if a := l.Addr().String(); a != addr[id] {
			t.Errorf("node %d got %s, it had %s", id, a, addr[id])
		}
		l.Close()
	}
	// An edited record must not open a port to the world.
	fourth, err := listenSSH(machines[:1], map[int]string{1: "0.0.0.0:2201"})
	if err != nil {
		t.Fatal(err)
	}
	defer fourth[1].Close()
	if a := netip.MustParseAddrPort(fourth[1].Addr().String()); !a.Addr().IsLoopback() {
		t.Errorf("listens on %s", a)
	}
}

func TestForward(t *testing.T) {
	guest, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	go func() {
		for {
			c, err := guest.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	var up atomic.Bool
	up.Store(true)
	dial := func(ctx context.Context) (net.Conn, error) {
		if !up.Load() {
			return nil, errors.New("no route")
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", guest.Addr().String())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- forward(ctx, l, dial) }()
	talk := func() string {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "hello")
		c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(c)
		return string(b)
	}
	if got := talk(); got != "hello" {
		t.Errorf("got %q", got)
	}
	up.Store(false)
	if got := talk(); got != "" {
		t.Errorf("from a guest that doesn't answer: %q", got)
	}
	up.Store(true)
	open, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	cancel() // with a connection open
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestConsole(t *testing.T) {
	var log buffer
	c := newConsole(&log)
	machine, line := net.Pipe()
	ended := make(chan struct{})
	go func() { c.run(line); close(ended) }()
	io.WriteString(machine, "SeaBIOS\nlog")
	found := make(chan error)
	go func() { found <- c.Expect(t.Context(), "login: ") }()
	io.WriteString(machine, "in: ")
	if err := <-found; err != nil {
		t.Fatal(err)
	}
	if err := c.Expect(t.Context(), "SeaBIOS"); err != nil {
		t.Errorf("past output: %v", err)
	}
	user, far := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	attached := make(chan error)
	go func() { attached <- c.Attach(ctx, far) }()
	past := make([]byte, len("SeaBIOS\nlogin: "))
	if _, err := io.ReadFull(user, past); err != nil || string(past) != "SeaBIOS\nlogin: " {
		t.Errorf("past %q, %v", past, err)
	}
	go io.WriteString(user, "root\n")
	typed := make([]byte, 5)
	if _, err := io.ReadFull(machine, typed); err != nil || string(typed) != "root\n" {
		t.Errorf("typed %q, %v", typed, err)
	}
	cancel()
	if err := <-attached; err != nil {
		t.Error(err)
	}
	user.Close()
	machine.Close()
	<-ended
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("typed to a machine that is off")
	}
	if log.String() != "SeaBIOS\nlogin: " {
		t.Errorf("log %q", log.String())
	}
	expired, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Expect(expired, "never"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	c.put(bytes.Repeat([]byte("x"), 2*ringSize))
	if got := len(c.Ring()); got != ringSize {
		t.Errorf("ring of %d bytes", got)
	}
}

func TestMatcher(t *testing.T) {
	for _, pieces := range []string{"xxmarkerxx", "xxmar|kerxx", "m|a|r|k|e|r", "mmarker", "mar|marker"} {
		m := newMatcher("marker")
		found := false
		for piece := range strings.SplitSeq(pieces, "|") {
			found = m.find([]byte(piece))
		}
		if !found {
			t.Errorf("not found in %s", pieces)
		}
	}
	m := newMatcher("marker")
	if m.find([]byte("mark")) || m.find([]byte("mer")) {
		t.Error("found what isn't there")
	}
}

// TestQMP plays QEMU.
func TestQMP(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		io.WriteString(theirs, `{"QMP": {"version": {}, "capabilities": ["oob"]}}`+"\r\n")
		in := bufio.NewScanner(theirs)
		for in.Scan() {
			var c struct {
				Execute string
				ID      int
			}
			json.Unmarshal(in.Bytes(), &c)
			switch c.Execute {
			case "system_reset":
				fmt.Fprintf(theirs, `{"timestamp": {"seconds": 1000, "microseconds": 500000}, "event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}}`+"\r\n")
				fmt.Fprintf(theirs, `{"return": {}, "id": %d}`+"\r\n", c.ID)
			case "quit":
				theirs.Close()
			case "qmp_capabilities":
				fmt.Fprintf(theirs, `{"return": {}, "id": %d}`+"\r\n", c.ID)
			default:
				fmt.Fprintf(theirs, "nonsense\r\n"+`{"id": %d, "error": {"class": "CommandNotFound", "desc": "no such command"}}`+"\r\n", c.ID)
			}
		}
	}()
	var events []qmpEvent
	q, err := newQMP(t.Context(), ours, func(e qmpEvent) { events = append(events, e) })
	if err != nil {
		t.Fatal(err)
	}
	if err := q.do(t.Context(), "system_reset", nil); err != nil {
		t.Fatal(err)
	}
	if len(events) != 1 || events[0].Name != "RESET" || !events[0].At.Equal(time.Unix(1000, 5e8)) || events[0].Data.Reason != "host-qmp-system-reset" {
		t.Errorf("events %+v", events)
	}
	if err := q.do(t.Context(), "dance", nil); err == nil || !strings.Contains(err.Error(), "no such command") {
		t.Errorf("unknown command: %v", err)
	}
	if err := q.do(t.Context(), "quit", nil); !errors.Is(err, errQMPClosed) {
		t.Errorf("quit: %v", err)
	}
	<-q.done
	if err := q.do(t.Context(), "system_reset", nil); !errors.Is(err, errQMPClosed) {
		t.Errorf("after the end: %v", err)
	}
}

func TestHint(t *testing.T) {
	var s tail
	io.WriteString(&s, "qemu-system-x86_64: warning: host doesn't support pni\nqemu-system-x86_64: -accel x: invalid accelerator x\n\n")
	if got, want := s.hint(), ": -accel x: invalid accelerator x"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	s.Write(bytes.Repeat([]byte("y"), 10<<10))
	if got := len(s.last(1 << 20)); got != 4<<10 {
		t.Errorf("%d bytes kept", got)
	}
	if got := s.last(3); got != "yyy" {
		t.Errorf("last %q", got)
	}
}

// TestCloseWithoutRun: a trial whose caller gave up leaves nothing.
func TestCloseWithoutRun(t *testing.T) {
	if _, err := Find(false); err != nil {
		t.Skip(err)
	}
	c, err := New(t.Context(), testOptions(t, 2))
	if err != nil {
		t.Fatal(err)
	}
	a := c.Report().Nodes[0]
	if a.Stage != "waiting" || !a.Link {
		t.Errorf("report %+v", a)
	}
	c.Close()
	l, err := net.Listen("tcp", a.SSH)
	if err != nil {
		t.Errorf("the ssh port is still taken: %v", err)
	} else {
		l.Close()
	}
	if left, _ := filepath.Glob(filepath.Join(c.sockets, "*.sock")); len(left) > 0 {
		t.Errorf("sockets left: %v", left)
	}
}
