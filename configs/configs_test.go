package configs

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// sameCluster lets cmp compare addresses, which have unexported fields.
var sameCluster = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func defaults(t testing.TB) Cluster {
	t.Helper()
	c := Default()
	c.derive()
	return c
}

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGQ0Yp0vJm8n0X1sXU0i8pVn1m8o0p9wqkZ3m5v7dY1x"

func TestParseDefaults(t *testing.T) {
	for _, text := range []string{"", "\n", "---\n", "# nothing\n", "{}\n", "network:\n", "nodes: {table: }\nname: ~\n"} {
		c, err := Parse("x", []byte(text))
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if d := cmp.Diff(defaults(t), c, sameCluster); d != "" {
			t.Errorf("%q is not the defaults:\n%s", text, d)
		}
	}
	d := defaults(t)
	if err := d.Validate(); err != nil {
		t.Error(err)
	}
}

func TestParseValues(t *testing.T) {
	c, err := Parse("x", []byte(`
name: 007
network:
  subnet: 192.168.4.64/26
  head: 192.168.4.65
  lease: 90m
nodes:
  discover_ids: [ "4 - 6", 9, 2-3]
  table:
    - {mac: 52-54-00-AA-BB-CC, id: 7}
    - mac: 5254.00aa.bbcd
      id: 9
      hostname: big
      address: 192.168.4.100
users: []
ssh:
  keys:
    - |
      `+testKey+`
trial: {memory: 1 GiB}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := defaults(t)
	want.Name = "007"
	want.Network.Subnet = netip.MustParsePrefix("192.168.4.64/26")
	want.Network.Head = netip.MustParseAddr("192.168.4.65")
	want.Network.Lease = Duration(90 * time.Minute)
	want.Nodes.IDs = []string{"4 - 6", "9", "2-3"}
	want.Nodes.Table = []Node{
		{MAC: "52:54:00:aa:bb:cc", ID: 7, Hostname: "007-7", Address: netip.MustParseAddr("192.168.4.71")},
		{MAC: "52:54:00:aa:bb:cd", ID: 9, Hostname: "big", Address: netip.MustParseAddr("192.168.4.100")},
	}
	want.Users = []User{}
	want.SSH.Keys = []string{testKey}
	want.Trial.Memory = 1 << 30
	if d := cmp.Diff(want, c, sameCluster); d != "" {
		t.Error(d)
	}
	if got, want := c.DiscoverIDs(), []int{2, 3, 4, 5, 6, 9}; !cmp.Equal(got, want) {
		t.Errorf("DiscoverIDs %v, want %v", got, want)
	}
}

// The ids that discovery may give follow from who has which address.
func TestDerivedIDs(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", "1-253"},
		{"network: {subnet: 10.0.0.0/16}", "1-255"},
		{"network: {subnet: 10.0.0.0/30}", "1"},
		{"network: {subnet: 10.0.0.64/28}", "1-13"},
		{"network: {head: 10.77.0.1}", "2-254"},
		{"network: {gateway: 10.77.0.1, dns: [10.77.0.100]}", "2-99 101-253"},
		{"nodes: {table: [{mac: '52:54:00:00:00:01', id: 200, address: 10.77.0.3}]}", "1-2 4-253"},
		{"nodes: {table: [{mac: '52:54:00:00:00:01', id: 3}]}", "1-253"},
	} {
		c, err := Parse("x", []byte(tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.text, err)
		} else if got := strings.Join(c.Nodes.IDs, " "); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.text, got, tt.want)
		}
	}
}

func TestErrorKinds(t *testing.T) {
	_, err := Parse("a.yaml", []byte("name: A\nsession_id: 0\n"))
	var all Errors
	if !errors.As(err, &all) || len(all) != 2 {
		t.Fatalf("not two findings: %v", err)
	}
	var first *Error
	if !errors.As(err, &first) || first.Field != "name" || first.File != "a.yaml" || first.Line != 1 || first.Column != 7 {
		t.Errorf("first finding: %+v", first)
	}

	c := defaults(t)
	c.Network.HTTPPort = 0
	if err := c.Validate(); err == nil || err.Error() != "network.http_port: 0 is not in 1..65535" {
		t.Errorf("without a file: %v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cluster.yaml")
	_, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if want := path + ": there is no such file\n  hint: 'krgimage init' writes one; --config names another"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if _, err := Load(dir); err == nil || err.Error() != dir+": can't be read: is a directory" {
		t.Errorf("a directory: %v", err)
	}
	if err := os.WriteFile(path, []byte("session_id: 7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil || c.SessionID != 7 {
		t.Errorf("session %d, %v", c.SessionID, err)
	}
	if err := os.WriteFile(path, []byte("#"+strings.Repeat("x", MaxFile)), 0o644); err != nil {
		t.Fatal(err)
	}
	want := path + ": larger than 128 KiB\n  hint: this isn't a cluster configuration; is it the right file?"
	if _, err := Load(path); err == nil || err.Error() != want {
		t.Errorf("too large: %v", err)
	}
}

// Bytes that no editor shows.
func TestBadBytes(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"name: a\nsuite: \xff", "x:2:8: not UTF-8 text\n  hint: save the file as UTF-8"},
		{"né\x00", "x:1:3: not UTF-8 text\n  hint: save the file as UTF-8"},
		{"a: " + strings.Repeat("[", 100000), "x:1:68: nested too deep\n  hint: the file needs five levels; is it the right one?"},
		{strings.Repeat("{", 100000), "x:1:65: nested too deep\n  hint: the file needs five levels; is it the right one?"},
	} {
		if _, err := Parse("x", []byte(tt.in)); err == nil || err.Error() != tt.want {
			t.Errorf("%.20q: %v, want %s", tt.in, err, tt.want)
		}
	}
}

// Nesting by indentation and by dashes must not overflow the stack either.
func TestDeepNesting(t *testing.T) {
	var b strings.Builder
	for i := range 600 {
		fmt.Fprintf(&b, "%sa:\n", strings.Repeat(" ", i))
	}
	n := 2000
	for _, in := range []string{b.String(), strings.Repeat("- ", n), strings.Repeat("? ", n), strings.Repeat("a: ", n),
		strings.Repeat("!x ", n), strings.Repeat("&x ", n), "a: " + strings.Repeat("- ", n), strings.Repeat(": ", n),
		strings.Repeat("!x\n", n), strings.Repeat("?\n", n), strings.Repeat("-\n", n), strings.Repeat("a:\n", n)} {
		if _, err := Parse("x", []byte(in)); err == nil {
			t.Errorf("%.20q: accepted", in)
		}
	}
}

func TestFindingsAreBounded(t *testing.T) {
	_, err := Parse("x", []byte("debian: {packages: ["+strings.Repeat("X,", 1000)+"]}"))
	var all Errors
	if !errors.As(err, &all) || len(all) != maxFindings+1 {
		t.Fatalf("%d findings", len(all))
	}
	if got, want := all[maxFindings].Error(), "x: and 1899 more findings"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTexts(t *testing.T) {
	for _, tt := range []struct {
		got  fmt.Stringer
		want string
	}{
		{Duration(0), "0s"},
		{Duration(12 * time.Hour), "12h"},
		{Duration(90 * time.Minute), "1h30m"},
		{Duration(90 * time.Second), "1m30s"},
		{Duration(10 * time.Minute), "10m"},
		{Duration(time.Hour + time.Second), "1h0m1s"},
		{Duration(1500 * time.Millisecond), "1.5s"},
		{Size(0), "0B"},
		{Size(1), "1B"},
		{Size(1536 << 10), "1536KiB"},
		{Size(512 << 20), "512MiB"},
		{Size(3 << 30), "3GiB"},
		{Size(1 << 40), "1TiB"},
	} {
		if tt.got.String() != tt.want {
			t.Errorf("%d prints as %s, want %s", tt.got, tt.got, tt.want)
		}
		// It reads back.
		v := reflect.New(reflect.TypeOf(tt.got))
		u := v.Interface().(interface{ UnmarshalText([]byte) error })
		if err := u.UnmarshalText([]byte(tt.want)); err != nil || v.Elem().Interface() != tt.got {
			t.Errorf("%s reads as %v, %v", tt.want, v.Elem(), err)
		}
	}
	for _, s := range []string{"", "12", "1MB", "MiB", "1.5GiB", "0x1MiB", "--1B"} {
		if err := new(Size).UnmarshalText([]byte(s)); err == nil {
			t.Errorf("size %q accepted", s)
		}
	}
	if hw := MAC("52:54:00:00:00:01").HardwareAddr(); hw.String() != "52:54:00:00:00:01" {
		t.Errorf("HardwareAddr %s", hw)
	}
	if hw := MAC("nonsense").HardwareAddr(); hw != nil {
		t.Errorf("HardwareAddr of nonsense: %s", hw)
	}
}

func TestAddress(t *testing.T) {
	c := defaults(t)
	for id, want := range map[int]string{0: "10.77.0.0", 1: "10.77.0.1", 255: "10.77.0.255"} {
		if a, err := c.Address(id); err != nil || a.String() != want {
			t.Errorf("id %d: %v, %v", id, a, err)
		}
	}
	for _, id := range []int{-1, 256, 1 << 40} {
		if a, err := c.Address(id); err == nil {
			t.Errorf("id %d has the address %v", id, a)
		}
	}
}

// commentedField is a default that the template shows without setting it: the
// '#' stands directly before the name.
var commentedField = regexp.MustCompile(`(?m)^( *)#([a-z_]+:)`)

func TestTemplate(t *testing.T) {
	text := Template()
	uncommented := commentedField.ReplaceAll(text, []byte("$1$2"))
	for what, text := range map[string][]byte{"as it is": text, "with all defaults uncommented": uncommented} {
		c, err := Parse("cluster.yaml", text)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if d := cmp.Diff(defaults(t), c, sameCluster); d != "" {
			t.Errorf("%s it is not the defaults:\n%s", what, d)
		}
	}

	// Every field occurs, with its name where the decoder finds it. The rows of
	// the node table have only an example in the comments.
	d := &decoder{places: map[string]place{}}
	body, bad := parseYAML(uncommented)
	if bad != nil {
		t.Fatal(bad)
	}
	c := Default()
	d.root(body, &c)
	var walk func(path string, rt reflect.Type)
	walk = func(path string, rt reflect.Type) {
		for i := range rt.NumField() {
			f := rt.Field(i)
			at := join(path, yamlName(f))
			if _, ok := d.places[at]; !ok {
				t.Errorf("the template lacks %s", at)
			}
			switch ft := f.Type; {
			case ft.Kind() == reflect.Struct && ft.PkgPath() == rt.PkgPath():
				walk(at, ft)
			case at == "users":
				walk("users[0]", ft.Elem())
			}
		}
	}
	walk("", reflect.TypeFor[Cluster]())
	for _, name := range fieldNames(reflect.TypeFor[Node]()) {
		if !regexp.MustCompile(`(?m)^  # +(- )?` + name + `: `).Match(text) {
			t.Errorf("the template has no example of nodes.table[].%s", name)
		}
	}
}

func TestShow(t *testing.T) {
	c, err := Parse("x", []byte("nodes: {table: [{mac: '52:54:00:00:00:01', id: 1}]}\nusers: [{name: 'yes', uid: 1000, keys: ['"+testKey+" a # b: \"c\"']}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := Show(c)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/show.yaml", text)
	again, err := Parse("show", text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if d := cmp.Diff(c, again, sameCluster); d != "" {
		t.Error(d)
	}

	// Show fills in what Default leaves open, without touching its argument.
	raw := Default()
	if _, err := Show(raw); err != nil || raw.Users[0].Shell != "" {
		t.Errorf("shell %q, %v", raw.Users[0].Shell, err)
	}
}

// FuzzParse: no input makes Parse panic, and what it accepts means the same
// after Show.
func FuzzParse(f *testing.F) {
	text, err := os.ReadFile("testdata/findings.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, c := range strings.Split(string(text), "\n== ") {
		_, body, _ := strings.Cut(c, "\n")
		in, _, _ := strings.Cut(body, "=>\n")
		f.Add([]byte(in))
	}
	f.Add(Template())
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("x", data)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without a text")
			}
			return
		}
		shown, err := Show(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("show", shown)
		if err != nil {
			t.Fatalf("%v\n%s", err, shown)
		}
		if d := cmp.Diff(c, again, sameCluster); d != "" {
			t.Errorf("%s\n%s", d, shown)
		}
		if err := c.Validate(); err != nil {
			t.Errorf("accepted, but Validate says %v", err)
		}
	})
}

// FuzzShow: the one free text of a configuration, a key's comment, survives
// Show and Parse whatever it is.
func FuzzShow(f *testing.F) {
	for _, s := range []string{"me@host", "a: b", "a #b", " - x", "\"", "'", "\\", "ä", "\u2028", "\u0085", "|", "{[", "a\tb", "%", "\ufeff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, comment string) {
		c := defaults(t)
		c.SSH.Keys = []string{testKey + " " + comment}
		c.derive()
		if c.Validate() != nil {
			return
		}
		shown, err := Show(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("show", shown)
		if err != nil {
			t.Fatalf("%v\n%s", err, shown)
		}
		if d := cmp.Diff(c, again, sameCluster); d != "" {
			t.Error(d)
		}
	})
}
