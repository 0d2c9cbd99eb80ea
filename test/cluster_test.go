package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFromNothingToACluster is the newcomer's way: init, build, trial, log in,
// work on two nodes, reboot one, stop.
func TestFromNothingToACluster(t *testing.T) {
	s := newSite(t)
	s.run(time.Minute, "init")
	s.fails("exists already", "init")
	s.fails("no image was built yet", "serve")

	t.Run("build", func(t *testing.T) { s := s.in(t); s.testBuild() })
	if t.Failed() {
		return
	}
	s.startTrial()
	for _, step := range []struct {
		name string
		test func(*site)
	}{
		{"the boot went through every service", (*site).testTimeline},
		{"users log in on port 2222", (*site).testLogin},
		{"node and session ids", (*site).testIdentity},
		{"one shared root", (*site).testSharedRoot},
		{"file locks hold between nodes", (*site).testLocks},
		{"strangers stay out", (*site).testStrangers},
		{"one head at a time", (*site).testSecondHead},
		{"a node reboots and comes back", (*site).testReboot},
		{"a node whose power was cut comes back", (*site).testPowerCut},
		{"stop leaves nothing", (*site).testStop},
		{"an ordinary user's own cluster", (*site).testRootless},
	} {
		t.Run(step.name, func(t *testing.T) { step.test(s.in(t)) })
	}
}

// in is the site for a subtest.
func (s *site) in(t *testing.T) *site { return &site{t: t, dir: s.dir, bin: s.bin} }

func (s *site) testBuild() {
	out := s.run(20*time.Minute, "build", "--json")
	for _, step := range []string{"Debian root", "Debian kernel", "Drivers and firmware", "Image"} {
		if !strings.Contains(out, fmt.Sprintf(`{"event":"done","step":%q`, step)) {
			s.t.Errorf("build --json reports no end of the step %q", step)
		}
	}
	current := s.path("state/image/current")
	info, err := os.Stat(filepath.Join(current, "initramfs.img"))
	if err != nil {
		s.t.Fatal(err)
	}
	if info.Size() > 40e6 {
		s.t.Errorf("the initramfs has %d bytes, more than 40 MB", info.Size())
	}

	// A build of a second site from the same inputs gives the same bytes.
	first, err := os.ReadFile(filepath.Join(current, "manifest.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	// Off a terminal it says what it made, and nothing else.
	out, progress, err := s.try(20*time.Minute, "build", "--state", s.path("again"))
	if err != nil || progress != "" || !strings.Contains(out, "initramfs.img") {
		s.t.Errorf("the second build: %v, output %q, messages %q", err, out, progress)
	}
	second, err := os.ReadFile(s.path("again/image/current/manifest.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		s.t.Errorf("two builds of the same inputs differ:\n%s\n%s", first, second)
	}

	// A truncated artefact is found before a machine meets it.
	initramfs := s.path("again/image/current/initramfs.img")
	if err := os.Truncate(initramfs, 1000); err != nil {
		s.t.Fatal(err)
	}
	s.fails("initramfs.img is damaged", "serve", "--state", s.path("again"))
	if err := os.RemoveAll(s.path("again")); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) testTimeline() {
	want := []string{"dhcp", "loader", "ipxe", "script", "kernel", "initramfs", "stage1", "link", "lease", "root", "init", "container", "ready"}
	nodes := s.nodes()
	if len(nodes) != 2 {
		s.t.Fatalf("the head knows %d machines, want 2", len(nodes))
	}
	for _, n := range nodes {
		var got []string
		for _, e := range n.Boot.Events {
			got = append(got, e.Stage)
		}
		for _, stage := range want {
			if !slices.Contains(got, stage) {
				s.t.Errorf("node %d: no stage %q in its timeline %v", n.ID, stage, got)
			}
		}
	}
	if text := s.run(time.Minute, "nodes"); !strings.Contains(text, "krg-2") || !strings.Contains(text, "ready") {
		s.t.Errorf("krgimage nodes prints\n%s", text)
	}
}

func (s *site) testLogin() {
	for _, n := range s.trialNodes() {
		for _, user := range []string{"krg", "root"} {
			if got, want := s.ssh(user, n.ID, "id -un; hostname"), user+"\n"+n.Hostname; got != want {
				s.t.Errorf("node %d as %s: got %q, want %q", n.ID, user, got, want)
			}
		}
	}
	// The same with a plain ssh client, as a user would.
	out, err := exec.Command("ssh", "-F", s.path("state/ssh/config"), "-o", "BatchMode=yes", "krg-1", "echo $SSH_CONNECTION").CombinedOutput()
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(out)), " 2222") {
		s.t.Errorf("plain ssh: %v, %q: not a connection to port 2222", err, out)
	}
	if _, _, err := s.try(time.Minute, "ssh", "1", "--", "exit 7"); err == nil || err.(*exec.ExitError).ExitCode() != 7 {
		s.t.Errorf("the exit code of a remote command is lost: %v", err)
	}
}

func (s *site) testIdentity() {
	for _, n := range s.trialNodes() {
		cmdline := s.ssh("krg", n.ID, "cat /proc/cmdline; krg node")
		for _, want := range []string{"root=/dev/ram", "ip=dhcp", "nfsroot=10.77.0.254:/", "session_id=1", fmt.Sprintf("node_id=%d", n.ID),
			"session_id: 1", fmt.Sprintf("node_id: %d", n.ID)} {
			if !strings.Contains(cmdline, want) {
				s.t.Errorf("node %d: no %q in\n%s", n.ID, want, cmdline)
			}
		}
		// Process 1 of the container is its own, not the machine's.
		if got := s.ssh("krg", n.ID, "tr '\\0' '\\n' < /proc/1/cmdline | head -1; cat /proc/1/comm"); !strings.HasPrefix(got, "krginit\n") {
			s.t.Errorf("node %d: process 1 is %q", n.ID, got)
		}
	}
	for _, name := range []string{"krgadm", "krgcapset", "migrate", "checkpoint", "restart", "krgcr-run"} {
		if got := s.ssh("root", 1, "command -v "+name); !strings.HasSuffix(got, "/"+name) {
			s.t.Errorf("the container has no command %s: %q", name, got)
		}
	}
}

func (s *site) testSharedRoot() {
	s.ssh("krg", 1, "echo from node 1 > note; ln note hard; ln -s note soft; mkfifo pipe; chmod 640 note")
	if got, want := s.ssh("krg", 2, "cat note hard soft; stat -c '%h %a %U' note; stat -c %F pipe"),
		"from node 1\nfrom node 1\nfrom node 1\n2 640 krg\nfifo"; got != want {
		s.t.Errorf("node 2 sees %q, want %q", got, want)
	}
	s.ssh("krg", 2, "echo from node 2 >> note; mv note renamed")
	if got, want := s.ssh("krg", 1, "cat renamed"), "from node 1\nfrom node 2"; got != want {
		s.t.Errorf("node 1 sees %q, want %q", got, want)
	}
	// /run and /dev are each node's own.
	s.ssh("root", 1, "touch /run/only-here /dev/shm/only-here")
	if got := s.ssh("root", 2, "ls /run/only-here /dev/shm/only-here 2>/dev/null | wc -l"); got != "0" {
		s.t.Errorf("/run or /dev/shm of node 1 shows on node 2")
	}
	// Names are looked up as the lease says, on each node, and ping works for users.
	if out, _, err := s.try(2*time.Minute, "ssh", "2", "--", "test -r /etc/resolv.conf && test -s /etc/machine-id && ping -c 3 -W 20 krg-1"); err != nil {
		s.t.Errorf("node 2 doesn't reach krg-1 by name: %v\n%s", err, out)
	}
	// Permissions hold on the server too.
	if out, _, err := s.try(time.Minute, "ssh", "--user", "krg", "1", "--", "cat /etc/shadow"); err == nil {
		s.t.Errorf("a user reads /etc/shadow: %q", out)
	}
}

// holdLock has a process of a node lock the file "held" of user krg; holder has
// its pid.
func (s *site) holdLock(node int) {
	s.t.Helper()
	if got := s.ssh("krg", node, `(flock -x held sh -c 'echo $$ >holder; exec sleep 100000' </dev/null >/dev/null 2>&1 &)
		while flock -n held true; do sleep 1; done; echo held`); got != "held" {
		s.t.Fatalf("node %d doesn't lock a file: %q", node, got)
	}
}

func (s *site) testLocks() {
	s.holdLock(1)
	if got := s.ssh("krg", 2, "flock -n held echo mine || echo refused"); got != "refused" {
		s.t.Errorf("node 2 locks what node 1 has locked: %q", got)
	}
	s.ssh("krg", 1, "kill $(cat holder)")
	if got := s.ssh("krg", 2, "flock -x held echo mine"); got != "mine" {
		s.t.Errorf("node 2 doesn't get what node 1 let go: %q", got)
	}
}

func (s *site) testStrangers() {
	host, port, _ := strings.Cut(s.trialNodes()[0].SSH, ":")
	key := s.path("stranger")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		s.t.Fatalf("ssh-keygen: %v %s", err, out)
	}
	for _, user := range []string{"root", "krg", "nobody"} {
		out, err := exec.Command("ssh", "-p", port, "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
			"-o", "UserKnownHostsFile=/dev/null", "-v", user+"@"+host, "id").CombinedOutput()
		if err == nil {
			s.t.Errorf("a stranger logs in as %s: %s", user, out)
		}
		methods := "Authentications that can continue: publickey\n"
		if !strings.Contains(strings.ReplaceAll(string(out), "\r", ""), methods) {
			s.t.Errorf("%s is offered more than a key:\n%s", user, out)
		}
	}
}

func (s *site) testSecondHead() {
	s.fails("already", "trial")
	s.run(5*time.Minute, "build") // a build beside a running cluster is fine
}

// bootOf is the start of a node's last boot, once that boot is ready.
func (s *site) bootOf(node int) (time.Time, bool) {
	for _, n := range s.nodes() {
		if n.ID == node && n.Boot != nil {
			last := n.Boot.Events[len(n.Boot.Events)-1]
			return n.Boot.Started, last.Stage == "ready"
		}
	}
	return time.Time{}, false
}

func (s *site) waitForNewBoot(node int, before time.Time) {
	s.t.Helper()
	waitFor(s.t, bootLimit, fmt.Sprintf("node %d boots again", node), func() bool { return s.reached(node, "ready", before) })
}

func (s *site) testReboot() {
	before, _ := s.bootOf(2)
	s.ssh("krg", 2, "echo kept > over-reboot; sync")
	s.try(time.Minute, "ssh", "--user", "root", "2", "--", "krg reboot") // the connection may break
	s.waitForNewBoot(2, before)
	if got := s.ssh("krg", 2, "cat over-reboot; hostname; krg node | grep node_id"); got != "kept\nkrg-2\nnode_id: 2" {
		s.t.Errorf("after the reboot node 2 says %q", got)
	}
}

func (s *site) testPowerCut() {
	before, _ := s.bootOf(1)
	s.holdLock(1)
	s.run(time.Minute, "trial", "power", "1", "kill")
	if got := s.ssh("krg", 2, "flock -n held echo mine || echo refused"); got != "refused" {
		s.t.Errorf("the locks of a node without power are free before it boots: %q", got)
	}
	if got := s.ssh("krg", 2, "cat over-reboot"); got != "kept" {
		s.t.Errorf("with node 1 dead, node 2 says %q", got)
	}
	s.run(time.Minute, "trial", "power", "1", "start")
	s.waitForNewBoot(1, before)
	if got := s.ssh("krg", 1, "cat over-reboot"); got != "kept" {
		s.t.Errorf("after the power cut node 1 says %q", got)
	}
	if got := s.ssh("krg", 2, "flock -x held echo mine"); got != "mine" {
		s.t.Errorf("node 2 doesn't get what node 1 held before the power cut: %q", got)
	}
}

func (s *site) testStop() {
	s.ssh("krg", 1, "echo kept > over-stop")
	var pids []int
	for _, n := range s.trialNodes() {
		pids = append(pids, n.PID)
	}
	s.run(2*time.Minute, "trial", "stop")
	for _, pid := range pids {
		waitFor(s.t, 10*time.Second, fmt.Sprintf("QEMU process %d ends", pid), func() bool {
			_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
			return os.IsNotExist(err)
		})
	}
	s.fails("no trial is running", "trial", "status")
	if _, err := os.Stat(s.path("state/root/live/home/krg/over-stop")); err != nil {
		s.t.Errorf("the users' files are gone: %v", err)
	}
}
