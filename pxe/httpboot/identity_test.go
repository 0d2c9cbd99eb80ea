package httpboot

import (
	"strings"
	"testing"
)

func TestParseIdentity(t *testing.T) {
	for body, ok := range map[string]bool{
		`{"token":"t","csr":"c"}`:          true,
		`{"csr":"c"}`:                      true,
		`{"token":"t"}`:                    false,
		`{"token":"t","csr":"c","node":4}`: false,
		`{"token":"t","csr":"c"}{}`:        false,
		`{"token":"t","csr":"c"} x`:        false,
		`{"token":7,"csr":"c"}`:            false,
		`[]`:                               false,
		``:                                 false,
		`{"csr":"c","token":"` + strings.Repeat("t", 200) + `"}`: false,
	} {
		if _, err := ParseIdentity([]byte(body)); (err == nil) != ok {
			t.Errorf("%.60s: %v", body, err)
		}
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add([]byte(`{"token":"t","csr":"c"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if r, err := ParseIdentity(body); err == nil && (r.CSR == "" || len(r.Token) > 128) {
			t.Errorf("%+v", r)
		}
	})
}
